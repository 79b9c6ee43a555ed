"""Whole runs of other families' own pipelines: steps and branches, dense bit-equal, and Radial with text beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import tiny
import torch
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from families import FAMILIES, TEXT, Family, Random
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

import falloff

STEPS = 3
random = Random(3)


def text(*names: str, kind: Callable[[], Tensor]) -> dict[str, Tensor]:
    """An argument and its negative twin, for each name."""
    return {f"{sign}{name}": kind() for name in names for sign in ("", "negative_")}


def embeds() -> Tensor:
    return random.normal(1, 5, TEXT)


def pooled() -> Tensor:
    return random.normal(1, 6)


def mask() -> Tensor:
    return torch.arange(5)[None] < 4


def lengths() -> Tensor:
    return torch.tensor([0, 5], dtype=torch.int32)


def flow(**more: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **more)


VIDEO = {"height": 64, "width": 64, "num_frames": 9}
IMAGE = {"height": 64, "width": 64}
SEPARATE = ("cond", "uncond")
TOGETHER = ("cond_uncond",)


class Part(SimpleNamespace):
    """A part of a pipeline that is asked for its settings and nothing else."""


def hunyuan_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def cogvideox_vae() -> Any:
    return diffusers.AutoencoderKLCogVideoX(
        latent_channels=2, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    ).eval()


def qwenimage_vae() -> Any:
    return diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=1, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0], latents_std=[1.0]
    ).eval()


def picture(size: int = 64) -> Image.Image:
    return Image.new("RGB", (size, size), (200, 90, 30))


class ImageEncoder(torch.nn.Module):
    """Passes what it gets on as its last layer but one."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self) -> None:
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, pixel_values: Tensor, output_hidden_states: bool) -> Part:
        return Part(hidden_states=[pixel_values, None])


def image_encoder() -> dict[str, Any]:
    hidden = torch.ones(1, 3, TEXT)
    return {
        "image_processor": lambda images, return_tensors: BatchFeature({"pixel_values": hidden}),
        "image_encoder": ImageEncoder(),
    }


def ltx2_parts() -> dict[str, Any]:
    statistics = {"latents_mean": torch.zeros(4), "latents_std": torch.ones(4)}
    return {
        "connectors": lambda embeds, mask, padding_side: (embeds, embeds, mask),
        "vae": Part(
            **statistics,
            config=SimpleNamespace(scaling_factor=1.0),
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        "audio_vae": Part(
            **statistics,
            config=SimpleNamespace(mel_bins=8, latent_channels=2, sample_rate=16000, mel_hop_length=160),
            mel_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
    }


@dataclass(frozen=True, kw_only=True)
class Run:
    """A family's ``pipeline`` around its tiny model, with ``parts`` it cannot do without and ``more`` of the config.

    ``text``: tokens beside the video, where the pipeline adds some of its own. ``order``: of the layers' calls, where
    it is not their own.
    """

    pipeline: str
    arguments: dict[str, Any]
    branches: tuple[str, ...] = SEPARATE
    scheduler: Callable[[], Any] = flow
    family: str | None = None
    parts: Callable[[], dict[str, Any]] = dict
    more: dict[str, Any] = field(default_factory=dict)
    text: int | None = None
    order: tuple[int, ...] | None = None


RUNS: dict[str, Run] = {
    "HunyuanVideo": Run(
        pipeline="HunyuanVideoPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            **text("pooled_prompt_embeds", kind=pooled),
            "true_cfg_scale": 4.0,
            **VIDEO,
        },
    ),
    "Mochi": Run(
        pipeline="MochiPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            **VIDEO,
            "num_frames": 13,
        },
        branches=TOGETHER,
        scheduler=lambda: flow(invert_sigmas=True),
    ),
    "CogVideoX": Run(
        pipeline="CogVideoXPipeline",
        arguments={**text("prompt_embeds", kind=embeds), **VIDEO},
        branches=TOGETHER,
        scheduler=diffusers.CogVideoXDDIMScheduler,
    ),
    "CogVideoX 1.5": Run(
        pipeline="CogVideoXPipeline",
        arguments={**text("prompt_embeds", kind=embeds), **VIDEO},
        branches=TOGETHER,
        scheduler=diffusers.CogVideoXDDIMScheduler,
        family="CogVideoX",
        more={"patch_size_t": 2, "patch_bias": False},
    ),
    "LTX": Run(
        pipeline="LTXPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            "height": 128,
            "width": 128,
            "num_frames": 17,
        },
        branches=TOGETHER,
    ),
    "Kandinsky 5": Run(
        pipeline="Kandinsky5T2VPipeline",
        arguments={
            **text("prompt_embeds_qwen", kind=embeds),
            **text("prompt_embeds_clip", kind=pooled),
            **text("prompt_cu_seqlens", kind=lengths),
            **VIDEO,
        },
    ),
    "SkyReels-V2": Run(
        pipeline="SkyReelsV2Pipeline",
        arguments={**text("prompt_embeds", kind=embeds), **VIDEO},
        scheduler=tiny.scheduler,
    ),
    "Allegro": Run(
        pipeline="AllegroPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=lambda: mask().long()),
            "negative_prompt": None,
            **VIDEO,
            "num_frames": 12,
        },
        branches=TOGETHER,
        scheduler=diffusers.DDIMScheduler,
    ),
    "FLUX.1": Run(
        pipeline="FluxPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("pooled_prompt_embeds", kind=pooled),
            "true_cfg_scale": 4.0,
            **IMAGE,
        },
    ),
    "QwenImage": Run(
        pipeline="QwenImagePipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_embeds_mask", kind=mask),
            "true_cfg_scale": 4.0,
            **IMAGE,
        },
    ),
    "HunyuanVideo I2V": Run(
        pipeline="HunyuanVideoImageToVideoPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            **text("pooled_prompt_embeds", kind=pooled),
            "true_cfg_scale": 4.0,
            "image": picture(),
            **VIDEO,
        },
        parts=lambda: {"vae": hunyuan_vae()},
    ),
    "HunyuanVideo 1.5": Run(
        pipeline="HunyuanVideo15Pipeline",
        arguments={
            **text("prompt_embeds", "prompt_embeds_2", kind=embeds),
            **text("prompt_embeds_mask", "prompt_embeds_mask_2", kind=mask),
            **VIDEO,
        },
        branches=("pred_cond", "pred_uncond"),
        parts=lambda: {
            "guider": diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
            "vae": Part(
                config=SimpleNamespace(latent_channels=2), temporal_compression_ratio=4, spatial_compression_ratio=16
            ),
        },
        more={"in_channels": 5, "out_channels": 2},
        text=729 + 5 + 5,
    ),
    "LTX-2": Run(
        pipeline="LTX2Pipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            "height": 128,
            "width": 128,
            "num_frames": 17,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
        },
        branches=("cond_uncond", "uncond_modality"),
        parts=ltx2_parts,
    ),
    "Wan VACE": Run(
        pipeline="WanVACEPipeline",
        arguments={**text("prompt_embeds", kind=embeds), **VIDEO},
        scheduler=tiny.scheduler,
        parts=lambda: {"vae": tiny.vae()},
        more={"in_channels": 16, "out_channels": 16, "vace_in_channels": 96},
        order=(2, 0, 1),
    ),
    "Wan Animate": Run(
        pipeline="WanAnimatePipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            "image": picture(),
            "pose_video": [picture()] * 9,
            "face_video": [picture(8)] * 9,
            "segment_frame_length": 9,
            "guidance_scale": 4.0,
            **IMAGE,
        },
        scheduler=tiny.scheduler,
        parts=lambda: {"vae": tiny.vae(), **image_encoder()},
        more={"in_channels": 36, "latent_channels": 16, "out_channels": 16, "image_dim": TEXT},
    ),
    "Wan TI2V": Run(
        pipeline="WanImageToVideoPipeline",
        arguments={**text("prompt_embeds", kind=embeds), "image": picture(), **VIDEO},
        scheduler=tiny.scheduler,
        family="Wan",
        parts=lambda: {"vae": tiny.vae(), "expand_timesteps": True},
        more={"in_channels": 16, "out_channels": 16},
    ),
    "CogVideoX I2V": Run(
        pipeline="CogVideoXImageToVideoPipeline",
        arguments={**text("prompt_embeds", kind=embeds), "image": picture(), **VIDEO},
        branches=TOGETHER,
        scheduler=diffusers.CogVideoXDDIMScheduler,
        family="CogVideoX",
        parts=lambda: {"vae": cogvideox_vae()},
        more={"out_channels": 2},
    ),
    "FLUX.2": Run(
        pipeline="Flux2Pipeline",
        arguments={"prompt_embeds": embeds(), **IMAGE},
        branches=("cond",),
    ),
    "QwenImage edit": Run(
        pipeline="QwenImageEditPipeline",
        arguments={
            **text("prompt_embeds", kind=embeds),
            **text("prompt_embeds_mask", kind=mask),
            "true_cfg_scale": 4.0,
            "image": picture(),
            **IMAGE,
        },
        family="QwenImage",
        parts=lambda: {"vae": qwenimage_vae()},
    ),
}
SERVED = [name for name, run in RUNS.items() if (run.family or name) in FAMILIES]
"""By this diffusers."""


def family_of(name: str) -> Family:
    return FAMILIES[RUNS[name].family or name]


def pipeline(name: str) -> Any:
    """A family's pipeline around its tiny model, with nothing in it that it can do without."""
    run, family = RUNS[name], family_of(name)
    cls = getattr(diffusers, run.pipeline)
    needed = dict.fromkeys(cls._get_signature_keys(cls)[0])
    model = dataclasses.replace(family, config={**family.config, **run.more}).build()
    torch.manual_seed(0)
    pipe = cls(**{**needed, **run.parts(), "transformer": model, "scheduler": run.scheduler()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    out = pipe(**RUNS[name].arguments, num_inference_steps=STEPS, output_type="latent", generator=generator)
    latent: Tensor = out.frames if hasattr(out, "frames") else out.images
    return latent


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images to edit keep the small size of the picture; the pipeline would make a million pixels of them."""
    monkeypatch.setattr(pipeline_qwenimage_edit, "calculate_dimensions", lambda area, ratio: (64, 64, None))


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32, which the CPU has anyway
@pytest.mark.parametrize("name", SERVED)
def test_run_is_followed(name: str) -> None:
    family, branches, pipe = family_of(name), RUNS[name].branches, pipeline(name)
    plain = generate(pipe, name)
    with falloff.using(pipe, "dense"):
        assert torch.equal(generate(pipe, name), plain)
    schedule = falloff.Schedule(dense_first=1, dense_layers=())
    falloff.enable(pipe, tiny.Frames(rows=family.image), schedule=schedule)
    layers = RUNS[name].order or range(family.layers)
    for run in range(2):
        assert not torch.equal(generate(pipe, name), plain)
        report = falloff.report(pipe)
        expected = [(run, step, branch, layer) for step in range(STEPS) for branch in branches for layer in layers]
        assert [(call.run, call.step, call.branch, call.layer) for call in report.calls] == expected
        assert report.reasons == {"dense first step": len(branches) * family.layers}


WITH_RADIAL = ("HunyuanVideo", "HunyuanVideo I2V", "HunyuanVideo 1.5", "Mochi", "CogVideoX", "LTX-2", "Wan VACE")


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", [name for name in WITH_RADIAL if name in SERVED])
def test_radial_serves_the_video(name: str) -> None:
    pipe = pipeline(name)
    plain = generate(pipe, name)
    falloff.enable(pipe, falloff.Radial(block=4, decay=0.05, neighbour="decayed"), schedule=tiny.ALWAYS)
    assert not torch.equal(generate(pipe, name), plain)
    report = falloff.report(pipe)
    assert report.reasons == {}
    assert 0 < report.density < 1
    text = RUNS[name].text
    assert report.plan.q_len == 48 + (family_of(name).text if text is None else text)
