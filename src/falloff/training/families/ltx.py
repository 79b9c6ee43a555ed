"""LTX-Video, from text and from a picture. Latents are packed into tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from falloff.training.family import Call, Family, Sample, Text, shifted_by_size


def _ltx_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 128)
    embeds, mask, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _ltx_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Normalised and packed into tokens, [1, N, C]."""
    vae = pipe.vae
    normal = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    packed: Tensor = pipe._pack_latents(
        normal, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    )
    return packed


def _ltx_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    frames, height, width = sample.size
    spatial = pipe.vae_spatial_compression_ratio
    scale = (pipe.vae_temporal_compression_ratio / call.get("frame_rate", 25), spatial, spatial)
    return {
        "hidden_states": noised,
        "timestep": 1000 * level,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": scale,
    }


def tokens_of(pipe: Any, call: Call) -> int:
    """How many tokens the video of a call has."""
    frames: int = (call["num_frames"] - 1) // pipe.vae_temporal_compression_ratio + 1
    spatial = pipe.vae_spatial_compression_ratio
    area: int = (call["height"] // spatial) * (call["width"] // spatial)
    return frames * area


def _ltx_timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    return shifted_by_size(pipe.scheduler, tokens_of(pipe, call), steps)


LTX = Family(
    pipelines=("LTXPipeline",),
    temporal=lambda pipe: int(pipe.vae_temporal_compression_ratio),
    latents=_ltx_latents,
    text=_ltx_text,
    inputs=_ltx_inputs,
    timetable=_ltx_timetable,
)


def _ltx_image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The clip's own first latent frame, which is all that a causal encoder makes of its picture, at noise level 0."""
    first = noised.shape[1] // sample.size[0]
    levels = level.repeat(1, noised.shape[1])
    levels[:, :first] = 0
    hidden = torch.cat([sample.latents[:, :first].to(noised), noised[:, first:]], dim=1)
    return {**_ltx_inputs(pipe, hidden, level, sample, call), "timestep": 1000 * levels}


LTX_IMAGE = replace(
    LTX,
    pipelines=("LTXImageToVideoPipeline",),
    inputs=_ltx_image_inputs,
    image=lambda pipe, picture, call: {},
    given=lambda pipe: 1,
)
