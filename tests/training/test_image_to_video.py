"""Pipelines that begin with a picture are trained from a clip's first, as they prepare it themselves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from worded_pipes import IMAGES, image_to_video

import falloff
from falloff import Schedule
from falloff.evaluation import generate
from falloff.training import Course, Lora, Size, TrainingError, adapter, train_lora
from falloff.training.adapter import SECOND_WEIGHTS, WEIGHTS
from falloff.training.cache import picture, prepare
from falloff.training.data import read_frames, usable
from falloff.training.families import family_of
from falloff.training.family import Sample
from falloff.training.noising import noising_of
from falloff.training.objective import Point, flow_loss, velocity

CPU = torch.device("cpu")
SIZE = Size(frames=9, height=32, width=32)
CALL = {"num_frames": 9, "height": 32, "width": 32, "max_sequence_length": 8}
STEPS = 4


@pytest.fixture(params=IMAGES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return image_to_video(request.param)


def clip_sample(pipe: Any, clips: Path, folder: Path) -> tuple[Sample, Any]:
    """A clip as it is trained on, and its first picture."""
    found = usable(clips, 9)[1:2]
    sample = prepare(pipe, family_of(pipe), found, SIZE, CALL, folder).sample(0, CPU)
    return sample, picture(read_frames(found[0], 9, 32, 32))


def transformers(pipe: Any) -> list[Any]:
    found = (getattr(pipe, name, None) for name in ("transformer", "transformer_2"))
    return [model for model in found if model is not None]


def taken(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """Of a call, what this pipeline has arguments for."""
    return {name: value for name, value in call.items() if generate.takes(pipe, name)}


def run(pipe: Any, image: Any) -> tuple[list[dict[str, Any]], Tensor]:
    """What a pipeline gives to its transformers, step by step, and its latents at the end."""
    given: list[dict[str, Any]] = []
    handles = [
        model.register_forward_pre_hook(lambda module, args, kwargs: given.append(kwargs), with_kwargs=True)
        for model in transformers(pipe)
    ]
    call = taken(pipe, {**CALL, "num_inference_steps": STEPS, "guidance_scale": 1.0, "output_type": "latent"})
    if hasattr(pipe, "guider"):
        pipe.guider.guidance_scale = 1.0
    out = pipe(prompt="a fox", image=image, generator=torch.Generator().manual_seed(0), **call).frames
    for handle in handles:
        handle.remove()
    return given, out


def latents_in(hidden: Tensor, sample: Sample) -> Tensor:
    """Without the channels beside them, which come after them."""
    return hidden[tuple(slice(size) for size in sample.latents.shape)]


@pytest.fixture(autouse=True)
def certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """LTX's pipeline draws what a picture is encoded to, from a distribution that is narrow when it is trained."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def test_arguments_are_those_of_the_pipeline(pipe: Any, clips: Path, tmp_path: Path) -> None:
    sample, image = clip_sample(pipe, clips, tmp_path)
    family = family_of(pipe)
    noising = noising_of(pipe, family, STEPS, CALL)
    given, _ = run(pipe, image)
    assert len(given) == STEPS
    for level, theirs in zip(noising.levels, given, strict=True):
        point = Point(sample, latents_in(theirs["hidden_states"], sample), noising, level)
        noised = torch.full_like(point.noise, 9.0)  # what the picture is given for comes from nowhere but the picture
        point.asked(noised).copy_(point.asked(point.noise))
        ours = {**family.inputs(pipe, noised, torch.tensor([level]), sample, CALL), **sample.text}
        expected = {key: value for key, value in theirs.items() if value is not None and key != "return_dict"}
        assert set(ours) == set(expected)
        for key, value in ours.items():
            tolerance = 1.0 if key == "timestep" else 1e-5  # Wan's scheduler tells whole timesteps
            torch.testing.assert_close(value, expected[key], atol=tolerance, rtol=0, check_dtype=False)


def test_the_velocity_leads_the_pipeline_to_the_clip(pipe: Any, clips: Path, tmp_path: Path) -> None:
    """Where the pipeline denoises; the frame that the picture is given for is never asked about."""
    sample, image = clip_sample(pipe, clips, tmp_path)
    replaced = pipe.transformer.config.get("image_condition_type") == "token_replace"
    assert sample.given == (pipe.config.get("expand_timesteps", False) or "LTX" in type(pipe).__name__ or replaced)
    family = family_of(pipe)
    given, _ = run(pipe, image)
    noising = noising_of(pipe, family, STEPS, CALL)
    point = Point(sample, latents_in(given[0]["hidden_states"], sample), noising, 1.0)
    aims = iter([noising.aim(level) for level in noising.levels])

    def target(**kwargs: Any) -> tuple[Tensor]:
        of_clean, of_noise = next(aims)
        return (of_clean * sample.latents + of_noise * point.noise,)

    for model in transformers(pipe):
        model.forward = target
    _, out = run(pipe, image)
    clean = sample.latents
    if clean.ndim == 5 and out.shape[2] < clean.shape[2]:  # HunyuanVideo hands out all but the picture
        out = torch.cat([clean[:, :, :1], out], dim=2)
    torch.testing.assert_close(point.asked(out), point.asked(clean), atol=2e-3, rtol=1e-3)
    of_clean, of_noise = noising.aim(1.0)
    wrong = of_clean * sample.latents + of_noise * point.noise
    if sample.given:
        (wrong[:, :64] if wrong.ndim == 3 else wrong[:, :, :1]).fill_(100.0)  # LTX has a token for every latent
    for model in transformers(pipe):
        model.forward = lambda **kwargs: (wrong,)
        assert flow_loss(velocity(pipe, family, model, point, CALL), point) == 0


@pytest.mark.parametrize("kind", ["HunyuanVideo", "HunyuanVideo 33ch"])
def test_without_a_caption_a_text_encoder_sees_black(kind: str) -> None:
    """As in the pipeline's own second pass."""
    made, given = image_to_video(kind), []
    made.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    image = Image.new("RGB", (32, 32), "red")
    call = {**CALL, "max_sequence_length": 256, "num_inference_steps": 1, "output_type": "latent"}
    made(prompt="a fox", image=image, **call, true_cfg_scale=2.0, negative_prompt="")
    seen = family_of(made).text(made, "", {**CALL, "max_sequence_length": 256})["encoder_hidden_states"]
    assert torch.equal(seen, given[1])
    assert not torch.equal(seen[:, -1:], given[0][:, -1:])


def test_a_size_that_the_pipeline_does_not_keep_is_refused() -> None:
    pipe = image_to_video("HunyuanVideo 1.5")
    unfit = family_of(pipe).unfit
    assert unfit(pipe, CALL) is None
    assert "height = 32 and width = 48 it makes a video of " in str(unfit(pipe, {**CALL, "width": 48}))
    pipe.transformer.register_to_config(use_meanflow=True)
    with pytest.raises(TrainingError, match="HunyuanVideo15ImageToVideoPipeline cannot be trained: its steps were dis"):
        family_of(pipe)


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry.get("loss", entry.get("validation")) for entry in entries]


def test_a_lora_is_trained_and_goes_on_bit_for_bit(pipe: Any, clips: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stop(doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == 3:
            raise Stopped

    def tune(name: str, **more: Any) -> None:
        lora = Lora(size=SIZE, trained_frames=9, rank=2, validation=1, samples=1)
        course = Course(steps=4, rate=0.05, warmup=0, save_every=2, check_every=4)
        settings = {"schedule": Schedule(dense_first=0, dense_layers=()), "call": call, "cache": tmp_path / "cache"}
        train_lora(pipe, clips, tmp_path / name, falloff.Radial(block=4), lora, course, **settings, **more)

    call = taken(pipe, {"num_inference_steps": 2, "max_sequence_length": 8, "guidance_scale": 2.0})
    tune("whole")
    adapter.unload(pipe)
    with pytest.raises(Stopped):
        tune("cut", progress=stop)
    tune("cut")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    files = (WEIGHTS, SECOND_WEIGHTS)[: len(transformers(pipe))]
    for file in files:
        ours, theirs = load_file(tmp_path / "cut" / file), load_file(tmp_path / "whole" / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((tmp_path / "whole" / "samples").glob("*.mp4"))) == 2
    assert not (tmp_path / "whole" / SECOND_WEIGHTS).exists() or len(files) == 2


def test_the_picture_is_the_clips_first() -> None:
    pixels = torch.randint(256, (3, 2, 4, 6), generator=torch.Generator().manual_seed(0))
    video = pixels[None] / 127.5 - 1
    assert (np.asarray(picture(video)) == pixels[:, 0].permute(1, 2, 0).numpy()).all()


def test_what_the_image_becomes_is_kept_for_each_kind(clips: Path, tmp_path: Path) -> None:
    """The same files in the same folder, for pipelines that differ in nothing but the image's place."""
    inside, _ = clip_sample(image_to_video("2.2 5B"), clips, tmp_path)
    assert inside.image["condition"].shape == (1, 16, 1, 4, 4)
    beside, _ = clip_sample(image_to_video("2.2"), clips, tmp_path)
    assert beside.image["condition"].shape == (1, 20, 3, 4, 4)
    assert (inside.given, beside.given) == (1, 0)
