"""LTX-2's video is trained as in the pipeline's own pass without sound, which is the pass that leads to the clip."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from hosts.test_pipelines import RUNS
from hosts.test_pipelines import pipeline as tiny_pipeline
from tiny import Frames

import falloff
from falloff.training import adapter
from falloff.training.families import family_of
from falloff.training.family import Sample
from falloff.training.noising import noising_of
from falloff.training.objective import point_at, velocity

STEPS = 4
SIZE = (3, 4, 4)


@pytest.fixture
def pipe() -> Any:
    made = tiny_pipeline("LTX-2")
    made.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=2.05, base_shift=0.95)
    made.connectors = lambda embeds, mask, padding_side: (embeds, embeds.roll(1, dims=1), mask)
    return made


@pytest.fixture
def call() -> dict[str, Any]:
    kept = {name: value for name, value in RUNS["LTX-2"].arguments.items() if "negative" not in name}
    return {**kept, "guidance_scale": 1.0, "audio_guidance_scale": 1.0, "frame_rate": 30.0, "motion_speed": 0.5}


def run(pipe: Any, call: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    """What the transformer is given in the passes without sound."""
    given: list[dict[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["isolate_modalities"]:
            given.append(dict(kwargs))

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(1)
    pipe(**call, num_inference_steps=STEPS, output_type="latent", generator=generator, **more)
    handle.remove()
    return given


def text_of(pipe: Any, call: dict[str, Any]) -> dict[str, Tensor]:
    encode = pipe.encode_prompt
    embeds = {name: value for name, value in call.items() if "prompt" in name}
    pipe.encode_prompt = lambda caption, **asked: encode(caption, **asked, **embeds)
    text: dict[str, Tensor] = family_of(pipe).text(pipe, "a fox", {})
    del pipe.encode_prompt
    return text


def test_the_video_is_that_of_the_pipelines_pass_without_sound(pipe: Any, call: dict[str, Any]) -> None:
    """Levels and arguments are its own, and what the video puts out, with the least of sound in place of all of it."""
    given = run(pipe, call)
    noising, text = noising_of(pipe, family_of(pipe), STEPS, call), text_of(pipe, call)
    assert len(given) == STEPS
    ways = {name: [] for name in ("ours", "theirs")}
    for level, theirs in zip(noising.levels, given, strict=True):
        hidden = theirs["hidden_states"]
        sample = Sample(hidden, SIZE, text)
        ours = {**family_of(pipe).inputs(pipe, hidden, torch.tensor([level]), sample, call), **text}
        for name in ("timestep", "sigma", "fps", "num_frames", "height", "width", "encoder_hidden_states"):
            torch.testing.assert_close(torch.as_tensor(ours[name]), torch.as_tensor(theirs[name]), check_dtype=False)
        with torch.no_grad():
            for name, arguments in (("ours", {**ours, "return_dict": False}), ("theirs", theirs)):
                ways[name].append(pipe.transformer(**arguments)[0])
    for ours, theirs in zip(*ways.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_velocity_leads_the_pipeline_to_the_clip(pipe: Any, call: dict[str, Any]) -> None:
    family, noising = family_of(pipe), noising_of(pipe, family_of(pipe), STEPS, call)
    generator = torch.Generator().manual_seed(2)
    raw = torch.randn(1, 4, *SIZE, generator=generator)
    pipe.vae.latents_mean, pipe.vae.latents_std = torch.linspace(-1, 1, 4), torch.linspace(0.5, 2, 4)
    clean, noise = family.latents(pipe, raw), torch.randn(1, 48, 4, generator=generator)
    of_clean, of_noise = noising.aim(0.5)  # a straight line's is the same everywhere

    def forward(hidden_states: Tensor, audio_hidden_states: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
        return of_clean * clean + of_noise * noise, torch.zeros_like(audio_hidden_states)

    pipe.transformer.forward = forward
    more = {"modality_scale": 1.0, "audio_modality_scale": 1.0, "latents": noise, "output_type": "latent"}
    made = pipe(**call, num_inference_steps=STEPS, generator=generator, **more).frames
    torch.testing.assert_close(made, raw, atol=1e-4, rtol=1e-4)


def test_levels_of_a_scheduler_that_says_nothing_of_sizes(pipe: Any, call: dict[str, Any]) -> None:
    from diffusers.pipelines.ltx2.pipeline_ltx2 import calculate_shift

    table = family_of(pipe).timetable(
        SimpleNamespace(**{**vars(pipe), "scheduler": SimpleNamespace(config={})}), 4, call
    )
    assert table["mu"] == pytest.approx(calculate_shift(48, 1024, 4096, 0.95, 2.05))


def test_a_lora_trains_and_loads(pipe: Any, call: dict[str, Any], tmp_path: Path) -> None:
    family, noising = family_of(pipe), noising_of(pipe, family_of(pipe), STEPS, call)
    text, generator = text_of(pipe, call), torch.Generator().manual_seed(1)
    point = point_at(Sample(torch.randn(1, 48, 4, generator=generator), SIZE, text), noising, 0.4, generator)
    with falloff.using(pipe, Frames()), adapter.adapted(pipe.transformer, 2, 0) as parameters:
        velocity(pipe, family, pipe.transformer, point, call).square().sum().backward()
        assert {call.reason for call in falloff.report(pipe).calls} == {None}
        assert all(p.grad is not None and p.grad.any() for key, p in parameters.items() if "lora_B" in key)
        assert all(".attn1." in key for key in parameters)
        for parameter in parameters.values():
            parameter.data.normal_(std=0.1, generator=generator)
        adapter.save(pipe, tmp_path)
    with torch.no_grad():
        tuned = velocity(pipe, family, pipe.transformer, point, call)
        adapter.unload(pipe)
        plain = velocity(pipe, family, pipe.transformer, point, call)
        with adapter.loaded(pipe, tmp_path):
            torch.testing.assert_close(velocity(pipe, family, pipe.transformer, point, call), tuned)
    assert not torch.allclose(tuned, plain, atol=1e-3)
