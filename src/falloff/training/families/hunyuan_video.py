"""HunyuanVideo, from text and from a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
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


BESIDE, REPLACED = "latent_concat", "token_replace"
"""Where the transformer has the picture: in more channels, or in place of the first latent frame."""
INTERLEAVES = {BESIDE: 2, REPLACED: 4}
"""Of how many tokens of the picture the text encoder's one is kept, unless the call says."""


def _image_text(pipe: Any, caption: str, call: Call) -> Text:
    """Of a caption and the picture, which the text encoder sees too. Where there is none, it is black, and all of it
    is as in the pipeline's second pass for guidance."""
    picture = call.get("image")
    kept = call.get("image_embed_interleave") or INTERLEAVES[pipe.transformer.config.image_condition_type]
    embeds, pooled, mask = pipe.encode_prompt(
        picture or Image.new("RGB", (call["width"], call["height"])),
        caption,
        max_sequence_length=call.get("max_sequence_length", 256),
        **({"image_embed_interleave": kept} if picture else {}),
    )
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "encoder_attention_mask": mask}


def _image(pipe: Any, picture: Image.Image, call: Call) -> Text:
    """The picture as latents of the first frame; beside the video, nothing for later frames and a mask."""
    height, width, device = call["height"], call["width"], pipe._execution_device
    pixels = pipe.video_processor.preprocess(picture, height, width)
    _, latents = pipe.prepare_latents(
        pixels.to(device, pipe.vae.dtype),
        batch_size=1,
        height=height,
        width=width,
        num_frames=call["num_frames"],
        dtype=torch.float32,
        device=device,
        latents=torch.zeros((), device=device),  # of no concern: only what comes of the picture is kept
        image_condition_type=pipe.transformer.config.image_condition_type,
    )
    if pipe.transformer.config.image_condition_type == REPLACED:
        return {"condition": latents}
    mask = torch.ones_like(latents[:, :1])
    condition = torch.cat([latents, mask], dim=1)
    condition[:, :, 1:] = 0
    return {"condition": condition}


def _image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The guidance only where it was distilled into the model."""
    config, condition = pipe.transformer.config, sample.image["condition"].to(noised)
    if config.image_condition_type == REPLACED:
        hidden = torch.cat([condition, noised[:, :, 1:]], dim=2)
    else:
        hidden = torch.cat([noised, condition], dim=1)
    inputs = {"hidden_states": hidden, "timestep": 1000 * level}
    if config.guidance_embeds:
        inputs["guidance"] = torch.full_like(level, 1000 * call.get("guidance_scale", 1.0)).to(noised.dtype)
    return inputs


HUNYUAN_VIDEO_IMAGE = replace(
    HUNYUAN_VIDEO,
    pipelines=("HunyuanVideoImageToVideoPipeline",),
    text=_image_text,
    inputs=_image_inputs,
    image=_image,
    given=lambda pipe: int(pipe.transformer.config.image_condition_type == REPLACED),
)
