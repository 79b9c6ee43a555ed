"""Tiny random Wan pipelines that take prompts in words: with two experts, and from an image to a video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from worded import pipeline

BOUNDARY = 0.75
IMAGES = ("2.1", "2.2", "2.2 5B", "SkyReels-V2")
"""The kinds of image to video: with a second view of the image by CLIP, with two experts, in place of a frame, and
another model like the first."""


def experts() -> WanPipeline:
    """Text to video; the second expert is at work below a noise level of 0.75."""
    parts = pipeline().components
    second = {"transformer_2": _transformer(parts, seed=1), "boundary_ratio": BOUNDARY}
    return _quiet(WanPipeline(**{**parts, **second}))


def image_to_video(kind: str) -> Any:
    parts = pipeline().components
    if kind == "SkyReels-V2":
        known = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
        config = {**known, "in_channels": 36, "image_dim": 12}
        own = {"transformer": SkyReelsV2Transformer3DModel.from_config(config).eval(), **_clip()}
        taken = {name: part for name, part in {**parts, **own}.items() if name != "transformer_2"}
        return _quiet(SkyReelsV2ImageToVideoPipeline(**taken))
    if kind == "2.1":
        more = {"transformer": _transformer(parts, in_channels=36, image_dim=12), **_clip()}
    elif kind == "2.2":
        first, second = (_transformer(parts, seed=seed, in_channels=36) for seed in (0, 1))
        more = {"transformer": first, "transformer_2": second, "boundary_ratio": BOUNDARY}
    else:
        more = {"expand_timesteps": True}
    return _quiet(WanImageToVideoPipeline(**{**parts, **more}))


def _transformer(parts: dict[str, Any], seed: int = 0, **changed: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    return WanTransformer3DModel.from_config({**parts["transformer"].config, **changed}).eval()


def _clip() -> dict[str, Any]:
    config = CLIPVisionConfig(
        hidden_size=12, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    size = {"height": 8, "width": 8}
    return {
        "image_encoder": CLIPVisionModel(config).eval(),
        "image_processor": CLIPImageProcessor(size=size, crop_size=size),
    }


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
