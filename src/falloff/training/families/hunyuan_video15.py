"""HunyuanVideo 1.5 from text: the places of a picture, in channels and in what is seen of it, are empty."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falloff.training.families.hunyuan_video import timetable
from falloff.training.family import Call, Family, Sample, Text


def _text(pipe: Any, caption: str, call: Call) -> Text:
    """Of two encoders, the second for words in quotation marks, which are to be written in the video."""
    embeds, mask, glyphs, glyph_mask = pipe.encode_prompt(caption, dtype=pipe.transformer.dtype)
    return {
        "encoder_hidden_states": embeds,
        "encoder_attention_mask": mask,
        "encoder_hidden_states_2": glyphs,
        "encoder_attention_mask_2": glyph_mask,
    }


def _inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    return {
        "hidden_states": torch.cat([noised, torch.zeros_like(noised), torch.zeros_like(noised[:, :1])], dim=1),
        "timestep": (1000 * level).to(noised.dtype),
        "image_embeds": noised.new_zeros(1, pipe.vision_num_semantic_tokens, pipe.vision_states_dim),
    }


HUNYUAN_VIDEO_15 = Family(
    pipelines=("HunyuanVideo15Pipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: latents * pipe.vae.config.scaling_factor,
    text=_text,
    inputs=_inputs,
    timetable=timetable,
)
