"""Wan 2.1, Wan 2.2 and SkyReels-V2, from text and from a picture."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from falloff.training.family import Call, Family, Sample, Text, normalised


def _wan_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 512)
    embeds, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds}


def _wan_boundary(pipe: Any) -> float:
    """Of the two experts of Wan 2.2 A14B: the first denoises from here on upwards, the second below."""
    return float(pipe.config.get("boundary_ratio") or 0.0)


def _wan_refuse(pipe: Any) -> str | None:
    missing = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is None]
    if "transformer" in missing or (missing and _wan_boundary(pipe)):
        return f"its boundary_ratio is {pipe.config.get('boundary_ratio')} and it has no {missing[0]}; load all of it"
    return None


WAN = Family(
    pipelines=("WanPipeline", "SkyReelsV2Pipeline"),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: normalised(latents, pipe.vae.config),
    text=_wan_text,
    inputs=lambda pipe, noised, level, sample, call: {"hidden_states": noised, "timestep": 1000 * level},
    boundary=_wan_boundary,
    refuse=_wan_refuse,
)


def _wan_image(pipe: Any, picture: Image, call: Call) -> Text:
    """The picture as latents, with a mask beside them unless it takes the first frame's place; and as seen by CLIP
    where the transformer is told so (Wan 2.1)."""
    height, width, device = call["height"], call["width"], pipe._execution_device
    pixels = pipe.video_processor.preprocess(picture, height=height, width=width)
    _, condition, *_ = pipe.prepare_latents(
        pixels.to(device, torch.float32),
        batch_size=1,
        num_channels_latents=pipe.vae.config.z_dim,
        height=height,
        width=width,
        num_frames=call["num_frames"],
        dtype=torch.float32,
        device=device,
        latents=torch.zeros((), device=device),  # of no concern: only what comes of the picture is kept
    )
    seen = {}
    if pipe.transformer.config.image_dim is not None:
        seen["encoder_hidden_states_image"] = pipe.encode_image(picture, device)
    return {"condition": condition, **seen}


def _wan_image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """More channels for the picture; or, in Wan 2.2 5B, its latents in place of the first frame, at noise level 0."""
    image = {name: x.to(noised) for name, x in sample.image.items()}
    condition = image.pop("condition")
    if not pipe.config.get("expand_timesteps"):
        return {"hidden_states": torch.cat([noised, condition], dim=1), "timestep": 1000 * level, **image}
    _, tall, wide = pipe.transformer.config.patch_size
    frames, height, width = sample.size
    levels = level.repeat(frames, height // tall, width // wide)
    levels[:1] = 0
    hidden = torch.cat([condition, noised[:, :, 1:]], dim=2)
    return {"hidden_states": hidden, "timestep": 1000 * levels.flatten()[None], **image}


WAN_IMAGE = replace(
    WAN,
    pipelines=("WanImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline"),
    inputs=_wan_image_inputs,
    image=_wan_image,
    given=lambda pipe: int(bool(pipe.config.get("expand_timesteps"))),
)
