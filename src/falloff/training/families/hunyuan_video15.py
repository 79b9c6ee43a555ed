"""HunyuanVideo 1.5. Without a picture, its places in channels and in what is seen of it are empty."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
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


def _image(pipe: Any, picture: Image, call: Call) -> Text:
    """The picture as latents of the first frame, nothing for later ones and a mask; and as seen by SigLIP."""
    height, width, device = call["height"], call["width"], pipe._execution_device
    frames = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    spatial = pipe.vae_scale_factor_spatial
    fitted = pipe.video_processor.resize(picture, height=height, width=width, resize_mode="crop")
    latents, mask = pipe.prepare_cond_latents_and_mask(
        latents=torch.empty(1, pipe.num_channels_latents, frames, height // spatial, width // spatial),  # for its shape
        image=fitted,
        batch_size=1,
        height=height,
        width=width,
        dtype=torch.float32,
        device=device,
    )
    seen = pipe.encode_image(image=fitted, batch_size=1, device=device, dtype=pipe.transformer.dtype)
    return {"condition": torch.cat([latents, mask], dim=1), "image_embeds": seen}


def _image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    return {
        "hidden_states": torch.cat([noised, sample.image["condition"].to(noised)], dim=1),
        "timestep": (1000 * level).to(noised.dtype),
        "image_embeds": sample.image["image_embeds"].to(noised),
    }


def _image_refuse(pipe: Any) -> str | None:
    if pipe.transformer.config.use_meanflow:
        return "its steps were distilled into mean flows, of which flow matching knows nothing"
    return None


def _image_unfit(pipe: Any, call: Call) -> str | None:
    """The pipeline takes its size from the picture's proportions."""
    asked = call["height"], call["width"]
    made = pipe.video_processor.calculate_default_height_width(*asked, target_size=pipe.target_size)
    if made != asked:
        return (
            f"of a picture of height = {asked[0]} and width = {asked[1]} it makes a video of {made[0]} and {made[1]}; "
            "give a size that it keeps"
        )
    return None


HUNYUAN_VIDEO_15_IMAGE = replace(
    HUNYUAN_VIDEO_15,
    pipelines=("HunyuanVideo15ImageToVideoPipeline",),
    inputs=_image_inputs,
    image=_image,
    refuse=_image_refuse,
    unfit=_image_unfit,
)
