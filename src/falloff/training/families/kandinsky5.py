"""Kandinsky 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falloff.hosts import host_for
from falloff.training.family import Call, Family, Sample, Text


def _kandinsky_text(pipe: Any, caption: str, call: Call) -> Text:
    embeds, pooled, lengths = pipe.encode_prompt(caption, max_sequence_length=call.get("max_sequence_length", 512))
    positions = torch.arange(int(lengths.diff().max()), device=embeds.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "text_rope_pos": positions}


def _kandinsky_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """Channels last; those for a picture, where the model has them, are empty."""
    frames, height, width = sample.size
    _, tall, wide = pipe.transformer.config.patch_size
    empty = [torch.zeros_like(noised), torch.zeros_like(noised[..., :1])] if pipe.transformer.visual_cond else []
    return {
        "hidden_states": torch.cat([noised, *empty], dim=-1),
        "timestep": (1000 * level).to(noised.dtype),
        "visual_rope_pos": [torch.arange(n, device=noised.device) for n in (frames, height // tall, width // wide)],
        "scale_factor": pipe._get_scale_factor(call["height"], call["width"]),
    }


KANDINSKY = Family(
    pipelines=("Kandinsky5T2VPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: (latents * pipe.vae.config.scaling_factor).permute(0, 2, 3, 4, 1),
    text=_kandinsky_text,
    inputs=_kandinsky_inputs,
    refuse=lambda pipe: host_for(pipe.transformer).refuse(pipe.transformer.config),
)
