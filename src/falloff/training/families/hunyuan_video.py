"""HunyuanVideo."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from falloff.training.family import Call, Family, Sample, Text


def _hunyuan_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 256)
    embeds, pooled, mask = pipe.encode_prompt(caption, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "encoder_attention_mask": mask}


def _hunyuan_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The guidance that was distilled into the model is told as in inference."""
    guidance = torch.full_like(level, 1000 * call.get("guidance_scale", 6.0))
    return {"hidden_states": noised, "timestep": 1000 * level, "guidance": guidance.to(noised.dtype)}


def timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    """What both HunyuanVideo and its successor give their scheduler."""
    return {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1]}


HUNYUAN_VIDEO = Family(
    pipelines=("HunyuanVideoPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: latents * pipe.vae.config.scaling_factor,
    text=_hunyuan_text,
    inputs=_hunyuan_inputs,
    timetable=timetable,
)
