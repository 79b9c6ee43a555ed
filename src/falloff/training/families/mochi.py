"""Mochi 1, which tells the share of the video, not of noise, and moves towards the video."""

from __future__ import annotations

from typing import Any

import numpy as np

from falloff.training.family import Call, Family, Text, normalised


def _mochi_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 256)
    embeds, mask, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _mochi_timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    return {"sigmas": np.array(linear_quadratic_schedule(steps, 0.025))}


MOCHI = Family(
    pipelines=("MochiPipeline",),
    temporal=lambda pipe: int(pipe.vae_temporal_scale_factor),
    latents=lambda pipe, latents: normalised(latents, pipe.vae.config, pipe.vae.config.scaling_factor),
    text=_mochi_text,
    inputs=lambda pipe, noised, level, sample, call: {"hidden_states": noised, "timestep": 1000 * (1 - level)},
    velocity=-1,
    timetable=_mochi_timetable,
)
