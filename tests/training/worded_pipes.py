"""Tiny random pipelines that take prompts in words: Wan with two experts, and from an image to a video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXImageToVideoPipeline,
    LTXVideoTransformer3DModel,
    SkyReelsV2ImageToVideoPipeline,
    SkyReelsV2Transformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from further_pipes import hunyuan_video15
from tiny_cogvideox import cogvideox
from tiny_hunyuan_video import hunyuan_video
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
from worded import pipeline

BOUNDARY = 0.75
IMAGES = (
    "2.1",
    "2.2",
    "2.2 5B",
    "SkyReels-V2",
    "LTX",
    "CogVideoX",
    "CogVideoX 1.5",
    "HunyuanVideo",
    "HunyuanVideo 33ch",
    "HunyuanVideo 1.5",
)
"""The kinds of image to video: with a second view of the image by CLIP, with two experts, in place of a frame,
another model like the first, in place of a frame's tokens, beside a diffusion, and seen by the text encoder: in place
of a frame, and beside it; and of a size that it tells."""


def experts() -> WanPipeline:
    """Text to video; the second expert is at work below a noise level of 0.75."""
    parts = pipeline().components
    second = {"transformer_2": _transformer(parts, seed=1), "boundary_ratio": BOUNDARY}
    return _quiet(WanPipeline(**{**parts, **second}))


def image_to_video(kind: str) -> Any:
    if kind.startswith("CogVideoX"):
        return cogvideox(patched_frames="1.5" in kind, image=True)
    if kind == "HunyuanVideo 1.5":
        return hunyuan_video15(image=True)
    if kind.startswith("HunyuanVideo"):
        return hunyuan_video(beside="33ch" in kind)
    parts = pipeline().components
    if kind == "SkyReels-V2":
        known = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
        config = {**known, "in_channels": 36, "image_dim": 12}
        own = {"transformer": SkyReelsV2Transformer3DModel.from_config(config).eval(), **_clip()}
        taken = {name: part for name, part in {**parts, **own}.items() if name != "transformer_2"}
        return _quiet(SkyReelsV2ImageToVideoPipeline(**taken))
    if kind == "LTX":
        return _quiet(_ltx(parts))
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


def _ltx(parts: dict[str, Any]) -> LTXImageToVideoPipeline:
    torch.manual_seed(0)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
        num_layers=2,
    )
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False, False, False, False, False),
        patch_size=1,
    )
    own = {
        "transformer": transformer.eval(),
        "vae": vae.eval(),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    return LTXImageToVideoPipeline(tokenizer=parts["tokenizer"], text_encoder=parts["text_encoder"], **own)


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
