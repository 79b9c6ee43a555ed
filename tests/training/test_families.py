"""Every family as its own pipeline runs it: the transformer's arguments, the noise levels, the sign of the velocity."""

import copy
import inspect
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
)
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1]))
from hosts.test_pipelines import RUNS, Part
from hosts.test_pipelines import pipeline as tiny_pipeline
from tiny import TEXT, Frames, scheduler, t2v

import falloff
from falloff.training import TrainingError, adapter
from falloff.training.families import family_of
from falloff.training.family import Sample
from falloff.training.noising import Noising, noising_of
from falloff.training.objective import point_at, velocity

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast"),  # Mochi asks for float32, which the CPU has anyway
    pytest.mark.filterwarnings("ignore:__array__ implementation"),  # between the scheduler of Allegro and numpy
]
STEPS = 4
NAMES = (
    "Wan",
    "SkyReels-V2",
    "HunyuanVideo",
    "HunyuanVideo 1.5",
    "Mochi",
    "LTX",
    "CogVideoX",
    "CogVideoX 1.5",
    "Kandinsky 5",
    "Allegro",
    "FLUX.1",
    "FLUX.2",
    "FLUX.2 klein",
    "QwenImage",
)
PICTURES = ("FLUX.1", "FLUX.2", "FLUX.2 klein", "QwenImage")
DIFFUSION = CogVideoXDDIMScheduler(
    prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
)
"""As the checkpoints of CogVideoX have it."""
OF_NOISE = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
"""The table of Allegro's, which draws noise at every step."""


BATCH_NORM = Part(running_mean=torch.linspace(-1, 1, 4), running_var=torch.linspace(0.5, 2, 4))
"""Of the autoencoder of FLUX.2."""
SIZED = FlowMatchEulerDiscreteScheduler(
    use_dynamic_shifting=True, max_shift=0.9, base_image_seq_len=8, max_image_seq_len=32, shift_terminal=0.02
)
"""As the checkpoints of Qwen-Image have it, for much smaller sizes."""


def pipe_and_call(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny pipeline without guidance by a second pass, and a call of it."""
    if name == "Wan":
        generator = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_frames": 9, "guidance_scale": 1.0}
        return t2v(scheduler_name="euler"), {"prompt_embeds": torch.randn(1, 4, TEXT, generator=generator), **size}
    run = RUNS[name.removesuffix(" klein")]
    kept = {key: value for key, value in run.arguments.items() if "negative" not in key and key != "true_cfg_scale"}
    pipe = tiny_pipeline(name.removesuffix(" klein"))
    if name == "FLUX.2 klein":
        pipe = Flux2KleinPipeline(**{**pipe.components, "transformer": reset(pipe.transformer, guidance_embeds=False)})
        pipe.set_progress_bar_config(disable=True)
        pipe.vae = Part(bn=BATCH_NORM, config=Part(batch_norm_eps=1e-4))  # which it asks for all latents it hands out
    if name.startswith("CogVideoX"):
        pipe.scheduler = copy.deepcopy(DIFFUSION)
    if name in PICTURES:
        pipe.scheduler = copy.deepcopy(SIZED)
    if name == "FLUX.1":
        pipe.transformer = reset(pipe.transformer, guidance_embeds=True)
    if name == "Allegro":
        pipe.scheduler = copy.deepcopy(OF_NOISE)
        pipe.vae = Part(use_tiling=True)
    if name == "SkyReels-V2":
        pipe.scheduler = scheduler("euler")  # its own tells whole timesteps
    if name == "HunyuanVideo 1.5":
        pipe.guider.guidance_scale = 1.0  # it has an object for that
        return pipe, kept
    return pipe, {**kept, "guidance_scale": 6.0 if name == "HunyuanVideo" else 1.0}


def reset(model: Any, **changed: Any) -> Any:
    """A model of the same class with other settings."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    return type(model)(**{**config, **changed}).eval()


def answers(noising: Noising, sign: int, clean: Tensor, noise: Tensor) -> Callable[..., Any]:
    """A forward that puts out the target at every one of the sampler's levels, one after the other."""
    aims = iter([noising.aim(level) for level in noising.levels])

    def forward(**kwargs: Any) -> Any:
        of_clean, of_noise = next(aims)
        return Transformer2DModelOutput(sample=sign * (of_clean * clean + of_noise * noise))

    return forward


def recorded(name: str) -> tuple[Any, dict[str, Any], list[dict[str, Any]], list[Tensor]]:
    """A pipeline, its call, and what its transformer was given and what latents there were, step by step."""
    pipe, call = pipe_and_call(name)
    given: list[dict[str, Any]] = []

    def keep(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.append({**kwargs, "hidden_states": kwargs["hidden_states"].clone()})  # Kandinsky's goes on in place

    handle = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(**call, num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(1))
    handle.remove()
    return pipe, call, given, [each["hidden_states"][:, : LATENT_CHANNELS.get(name)] for each in given]


IDLE = ("return_dict", "joint_attention_kwargs", "attention_kwargs")
"""What a pipeline hands on and no family has to."""
LATENT_CHANNELS = {"HunyuanVideo 1.5": 2}
"""Where more of them, for a picture, come after those of the latents."""


def begun(name: str, call: dict[str, Any], noising: Noising, clean: Tensor, noise: Tensor) -> dict[str, Any]:
    """A call that begins at the sampler's first level, which in Allegro's table is not all noise."""
    of_clean, of_noise = noising.mix(noising.levels[0])
    return {**call, "latents": of_clean * clean + of_noise * noise} if name == "Allegro" else call


def encoded(pipe: Any, call: dict[str, Any]) -> None:
    """``encode_prompt`` hands on the embeddings of the call, in its own order, instead of running text encoders."""
    embeds = {key: value for key, value in call.items() if "prompt" in key}
    if "prompt_cu_seqlens" in embeds:  # Kandinsky's takes none
        pipe.encode_prompt = lambda caption, max_sequence_length: tuple(embeds.values())
        return
    pipe.encode_prompt = partial(pipe.encode_prompt, **embeds)


def latent_size(name: str, pipe: Any, hidden: Tensor, call: dict[str, Any]) -> tuple[int, int, int]:
    if name.startswith("CogVideoX"):
        return hidden.shape[1], *hidden.shape[3:]
    if name == "Kandinsky 5":
        return tuple(hidden.shape[1:4])
    if name in PICTURES:
        return 1, *(call[side] // pipe.vae_scale_factor for side in ("height", "width"))
    if name != "LTX":
        return tuple(hidden.shape[2:])
    spatial = pipe.vae_spatial_compression_ratio
    frames = (call["num_frames"] - 1) // pipe.vae_temporal_compression_ratio + 1
    return frames, call["height"] // spatial, call["width"] // spatial


@pytest.mark.parametrize("name", NAMES)
def test_arguments_and_levels_are_those_of_the_pipeline(name: str) -> None:
    pipe, call, given, hidden = recorded(name)
    family = family_of(pipe)
    noising = noising_of(pipe, family, STEPS, call)
    size = latent_size(name, pipe, hidden[0], call)
    encoded(pipe, call)
    text = family.text(pipe, "a fox", {})
    assert len(given) == STEPS
    sample = Sample(hidden[0], size, text)
    for level, noised, theirs in zip(noising.levels, hidden, given, strict=True):
        ours = {**family.inputs(pipe, noised, torch.tensor([level]), sample, call), **text}
        expected = {key: value for key, value in theirs.items() if key not in IDLE and value is not None}
        assert set(ours) == set(expected)
        for key, value in ours.items():
            if isinstance(value, Tensor | tuple | list) and key != "rope_interpolation_scale":
                tolerance = 2e-6 if name in PICTURES else 2e-3  # they tell levels as such, others in thousandths
                torch.testing.assert_close(value, expected[key], atol=tolerance, rtol=1e-5, check_dtype=False)
            else:
                assert value == expected[key]


@pytest.mark.parametrize("name", NAMES)
def test_the_velocity_leads_the_pipeline_to_the_clean_latent(name: str) -> None:
    """A transformer that puts out our target, in the family's sign, makes the pipeline end at x_0."""
    pipe, call, _, hidden = recorded(name)
    family = family_of(pipe)
    noising = noising_of(pipe, family, STEPS, call)
    generator = torch.Generator().manual_seed(2)
    clean = torch.randn(hidden[0].shape, generator=generator)
    call = begun(name, call, noising, clean, hidden[0])
    assert noising.levels[0] == pytest.approx(1)
    pipe.transformer.forward = answers(noising, family.velocity, clean, hidden[0])
    final = torch.zeros(())
    step = pipe.scheduler.step

    def keep(*args: Any, **kwargs: Any) -> Any:
        nonlocal final
        out = step(*args, **kwargs)
        final = out[0]
        return out

    pipe.scheduler.step = keep
    pipe(**call, num_inference_steps=STEPS, output_type="latent", generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(final, clean, atol=1e-3, rtol=1e-3)
    size = latent_size(name, pipe, clean, call)
    sample = Sample(clean, size, {})
    point = point_at(sample, noising, 0.4, generator)
    pipe.transformer.forward = lambda **kwargs: (family.velocity * point.target,)
    torch.testing.assert_close(velocity(pipe, family, pipe.transformer, point, call), point.target)


CHANNELS = {"LTX": 2, "CogVideoX": 2, "CogVideoX 1.5": 2, "Kandinsky 5": 4, **dict.fromkeys(PICTURES, 2)}
"""Where the channels are, where they do not come first."""


class Decoding(Exception):
    """Carries what an autoencoder was to decode."""


def statistics(name: str, channels: int) -> dict[str, Any]:
    """Mochi's pipeline reads statistics for 12 channels only, which the tiny one has not."""
    if name not in ("Wan", "SkyReels-V2", "LTX", "QwenImage"):
        return {"latents_mean": None, "latents_std": None}
    mean, std = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


@pytest.mark.parametrize("name", NAMES)
def test_the_pipeline_decodes_what_was_encoded(name: str) -> None:
    """Latents as the family makes them are turned back into the autoencoder's own before they are decoded."""
    pipe, call, _, hidden = recorded(name)
    family = family_of(pipe)
    frames, *rest = latent_size(name, pipe, hidden[0], call)
    size = frames - (name == "CogVideoX 1.5"), *rest  # which has two frames to a patch, and the first one twice
    channels = hidden[0].shape[CHANNELS.get(name, 1)] // (4 if name in PICTURES else 1)
    raw = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(3))

    def decode(latents: Tensor, *args: Any, **kwargs: Any) -> None:
        raise Decoding(latents)

    known = statistics(name, channels)
    config = FrozenDict(
        scaling_factor=0.7, shift_factor=0.3, batch_norm_eps=1e-4, timestep_conditioning=False, z_dim=channels, **known
    )
    tensors = {key: torch.tensor(value) for key, value in known.items() if value is not None}
    place = {"dtype": torch.float32, "device": torch.device("cpu"), "modules": lambda: iter(())}
    pipe.vae = Part(bn=BATCH_NORM, config=config, decode=decode, **place, **tensors)
    clean = family.latents(pipe, raw)
    call = begun(name, call, noising_of(pipe, family, STEPS, call), clean, hidden[0])
    pipe.transformer.forward = answers(noising_of(pipe, family, STEPS, call), family.velocity, clean, hidden[0])
    with pytest.raises(Decoding) as caught:
        pipe(**call, num_inference_steps=STEPS, output_type="pt", generator=torch.Generator().manual_seed(1))
    decoded = caught.value.args[0]
    torch.testing.assert_close(decoded, raw[:, :, 0] if name.startswith("FLUX") else raw, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_a_lora_trains_and_loads(name: str, tmp_path: Path) -> None:
    """Every projection gets a gradient through the sparse attention, and the pipeline loads what is saved."""
    pipe, call, _, hidden = recorded(name)
    encoded(pipe, call)
    family = family_of(pipe)
    noising, size = noising_of(pipe, family, STEPS, call), latent_size(name, pipe, hidden[0], call)
    text = {key: value.detach() for key, value in family.text(pipe, "a fox", {}).items()}
    point = point_at(Sample(torch.randn_like(hidden[0]), size, text), noising, 0.4, torch.Generator().manual_seed(1))
    with falloff.using(pipe, Frames()), adapter.adapted(pipe.transformer, 2, 0) as parameters:
        velocity(pipe, family, pipe.transformer, point, call).square().sum().backward()
        assert {call.reason for call in falloff.report(pipe).calls} == {None}
        silent = [key for key, p in parameters.items() if "lora_B" in key and not (p.grad is not None and p.grad.any())]
        # the last layer's text leads to no output
        assert all(".add_q_proj." in key or ".to_add_out." in key for key in silent)
        for parameter in parameters.values():
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
        adapter.save(pipe, tmp_path)
    with torch.no_grad():
        tuned = velocity(pipe, family, pipe.transformer, point, call)
        adapter.unload(pipe)
        plain = velocity(pipe, family, pipe.transformer, point, call)
        with adapter.loaded(pipe, tmp_path):
            torch.testing.assert_close(velocity(pipe, family, pipe.transformer, point, call), tuned)
    assert not torch.allclose(tuned, plain, atol=1e-3)


def test_documented_arguments_of_encode_prompt_exist() -> None:
    import diffusers

    for name in ("WanPipeline", "MochiPipeline", "LTXPipeline", "CogVideoXPipeline"):
        known = inspect.signature(getattr(diffusers, name).encode_prompt).parameters
        assert {"do_classifier_free_guidance", "max_sequence_length"} <= set(known)


def test_other_pipelines_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"WanVACEPipeline cannot be trained here; .*HunyuanVideoPipeline"):
        family_of(tiny_pipeline("Wan VACE"))
    pipe = tiny_pipeline("CogVideoX")
    with pytest.raises(TrainingError, match="CogVideoXDDIMScheduler with prediction_type='epsilon' is no diffusion"):
        noising_of(pipe, family_of(pipe), STEPS, {})


def test_kandinsky_leaves_the_place_of_a_picture_empty() -> None:
    pipe, call = pipe_and_call("Kandinsky 5")
    pipe.transformer = reset(pipe.transformer, visual_cond=True)
    given = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs["hidden_states"].clone()), with_kwargs=True
    )
    pipe(**call, num_inference_steps=1, output_type="latent")
    noised = given[0][..., :4]
    sample = Sample(noised, tuple(noised.shape[1:4]), {})
    ours = family_of(pipe).inputs(pipe, noised, torch.tensor([1.0]), sample, call)["hidden_states"]
    assert ours.shape[-1] == 9
    assert torch.equal(ours, given[0])
    pipe.transformer.register_to_config(attention_type="nabla")
    with pytest.raises(TrainingError, match="Kandinsky5T2VPipeline cannot be trained: its attention is sparse already"):
        family_of(pipe)


def test_one_level_for_all_tokens_is_one_level() -> None:
    """Wan 2.2 5B is told the level of every token, which are all the same in text to video."""
    pipe = t2v()
    noised, text = torch.randn(1, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 4, TEXT)
    given = family_of(pipe).inputs(pipe, noised, torch.tensor([0.3]), Sample(noised, (3, 8, 8), {}), {})
    with torch.no_grad():
        ours = pipe.transformer(**given, encoder_hidden_states=text, return_dict=False)[0]
        given["timestep"] = given["timestep"].expand(1, 3 * 4 * 4)
        theirs = pipe.transformer(**given, encoder_hidden_states=text, return_dict=False)[0]
    torch.testing.assert_close(ours, theirs)


def test_allegros_own_scheduler_goes_the_same_way() -> None:
    """It scales its samples down to those that the transformer is trained on."""
    pipe, call = pipe_and_call("Allegro")
    pipe.scheduler = EulerAncestralDiscreteScheduler()
    noising = noising_of(pipe, family_of(pipe), STEPS, call)
    pipe.scheduler.set_timesteps(STEPS)
    clean, noise = torch.randn(2, 1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for number, level in enumerate(noising.levels):
        pipe.scheduler.set_begin_index(number)
        pipe.scheduler._step_index = None
        noised = clean + pipe.scheduler.sigmas[number] * noise
        theirs = pipe.scheduler.scale_model_input(noised, pipe.scheduler.timesteps[number])
        of_clean, of_noise = noising.mix(level)
        torch.testing.assert_close(theirs, of_clean * clean + of_noise * noise, atol=1e-4, rtol=1e-4)


def test_what_allegros_tiles_do_not_cover_is_refused() -> None:
    pipe, _ = pipe_and_call("Allegro")
    unfit = family_of(pipe).unfit
    pipe.vae = Part(use_tiling=True, kernel=(24, 320, 320), stride=(16, 200, 240))
    call = {"num_frames": 88, "height": 720, "width": 1280}
    assert unfit(pipe, call) is None
    assert "num_frames = 81; the nearest are 72 and 88" in str(unfit(pipe, {**call, "num_frames": 81}))
    assert "height = 300; the nearest are 320" in str(unfit(pipe, {**call, "height": 300}))
    pipe.vae.use_tiling = False
    with pytest.raises(TrainingError, match=r"AllegroPipeline cannot be trained: .*; call pipe.vae.enable_tiling"):
        family_of(pipe)
