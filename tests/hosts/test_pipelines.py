"""Whole runs of other families' own pipelines: steps and branches, dense bit-equal, and Radial with text beside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import tiny
import torch
from families import FAMILIES, TEXT, Random
from torch import Tensor

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
RUNS: dict[str, tuple[str, Callable[[], Any], dict[str, Any], tuple[str, ...]]] = {
    "HunyuanVideo": (
        "HunyuanVideoPipeline",
        flow,
        {
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            **text("pooled_prompt_embeds", kind=pooled),
            "true_cfg_scale": 4.0,
            **VIDEO,
        },
        SEPARATE,
    ),
    "Mochi": (
        "MochiPipeline",
        lambda: flow(invert_sigmas=True),
        {**text("prompt_embeds", kind=embeds), **text("prompt_attention_mask", kind=mask), **VIDEO, "num_frames": 13},
        TOGETHER,
    ),
    "CogVideoX": (
        "CogVideoXPipeline",
        diffusers.CogVideoXDDIMScheduler,
        {**text("prompt_embeds", kind=embeds), **VIDEO},
        TOGETHER,
    ),
    "LTX": (
        "LTXPipeline",
        flow,
        {
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=mask),
            "height": 128,
            "width": 128,
            "num_frames": 17,
        },
        TOGETHER,
    ),
    "Kandinsky 5": (
        "Kandinsky5T2VPipeline",
        flow,
        {
            **text("prompt_embeds_qwen", kind=embeds),
            **text("prompt_embeds_clip", kind=pooled),
            **text("prompt_cu_seqlens", kind=lengths),
            **VIDEO,
        },
        SEPARATE,
    ),
    "SkyReels-V2": (
        "SkyReelsV2Pipeline",
        tiny.scheduler,
        {**text("prompt_embeds", kind=embeds), **VIDEO},
        SEPARATE,
    ),
    "Allegro": (
        "AllegroPipeline",
        diffusers.DDIMScheduler,
        {
            **text("prompt_embeds", kind=embeds),
            **text("prompt_attention_mask", kind=lambda: mask().long()),
            "negative_prompt": None,
            **VIDEO,
            "num_frames": 12,
        },
        TOGETHER,
    ),
    "FLUX.1": (
        "FluxPipeline",
        flow,
        {
            **text("prompt_embeds", kind=embeds),
            **text("pooled_prompt_embeds", kind=pooled),
            "true_cfg_scale": 4.0,
            **IMAGE,
        },
        SEPARATE,
    ),
    "QwenImage": (
        "QwenImagePipeline",
        flow,
        {
            **text("prompt_embeds", kind=embeds),
            **text("prompt_embeds_mask", kind=mask),
            "true_cfg_scale": 4.0,
            **IMAGE,
        },
        SEPARATE,
    ),
}


def pipeline(name: str) -> Any:
    """A family's pipeline around its tiny model, with nothing else in it."""
    cls = getattr(diffusers, RUNS[name][0])
    parts = dict.fromkeys(cls._get_signature_keys(cls)[0])
    pipe = cls(**{**parts, "transformer": FAMILIES[name].build(), "scheduler": RUNS[name][1]()})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, name: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    out = pipe(**RUNS[name][2], num_inference_steps=STEPS, output_type="latent", generator=generator)
    latent: Tensor = out.frames if hasattr(out, "frames") else out.images
    return latent


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32, which the CPU has anyway
@pytest.mark.parametrize("name", [name for name in RUNS if name in FAMILIES])
def test_run_is_followed(name: str) -> None:
    family, branches, pipe = FAMILIES[name], RUNS[name][3], pipeline(name)
    plain = generate(pipe, name)
    with falloff.using(pipe, "dense"):
        assert torch.equal(generate(pipe, name), plain)
    schedule = falloff.Schedule(dense_first=1, dense_layers=())
    falloff.enable(pipe, tiny.Frames(rows=family.image), schedule=schedule)
    for run in range(2):
        assert not torch.equal(generate(pipe, name), plain)
        report = falloff.report(pipe)
        expected = [
            (run, step, branch, layer) for step in range(STEPS) for branch in branches for layer in range(family.layers)
        ]
        assert [(call.run, call.step, call.branch, call.layer) for call in report.calls] == expected
        assert report.reasons == {"dense first step": len(branches) * family.layers}


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("name", ["HunyuanVideo", "Mochi", "CogVideoX"])
def test_radial_with_text_beside(name: str) -> None:
    pipe = pipeline(name)
    plain = generate(pipe, name)
    falloff.enable(pipe, falloff.Radial(block=4, decay=0.05, neighbour="decayed"), schedule=tiny.ALWAYS)
    assert not torch.equal(generate(pipe, name), plain)
    report = falloff.report(pipe)
    assert report.reasons == {}
    assert 0 < report.density < 1
    assert report.plan.q_len == 48 + FAMILIES[name].text
