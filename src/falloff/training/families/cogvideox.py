"""CogVideoX, from text and from a picture. Trained by diffusion."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from falloff.training.family import Call, Family, Sample, Text


def _cogvideox_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Frames before channels; where frames are patched too, the first is repeated until they can be."""
    scaled = (latents * pipe.vae.config.scaling_factor).transpose(1, 2)
    more = -scaled.shape[1] % (pipe.transformer.config.get("patch_size_t") or 1)
    return torch.cat([*[scaled[:, :1]] * more, scaled], dim=1)


def _cogvideox_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 226)
    embeds, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds}


def _cogvideox_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The step of the scheduler's table is told, and the positions where they are not learned."""
    last = pipe.scheduler.config.num_train_timesteps - 1
    inputs = {"hidden_states": noised, "timestep": (last * level).round().long()}
    if pipe.transformer.config.use_rotary_positional_embeddings:
        positions = pipe._prepare_rotary_positional_embeddings
        inputs["image_rotary_emb"] = positions(call["height"], call["width"], noised.shape[1], noised.device)
    return inputs


COGVIDEOX = Family(
    pipelines=("CogVideoXPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=_cogvideox_latents,
    text=_cogvideox_text,
    inputs=_cogvideox_inputs,
    diffuses="v_prediction",
)


def _cogvideox_image(pipe: Any, picture: Image, call: Call) -> Text:
    """The picture as latents, and nothing for later frames. The pipeline draws them, which is done once for a clip."""
    height, width, device = call["height"], call["width"], pipe._execution_device
    latent = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    more = -latent % (pipe.transformer.config.get("patch_size_t") or 1)
    pixels = pipe.video_processor.preprocess(picture, height=height, width=width)
    _, condition = pipe.prepare_latents(
        pixels.to(device, pipe.vae.dtype),
        num_channels_latents=pipe.transformer.config.in_channels // 2,
        num_frames=call["num_frames"] + more * pipe.vae_scale_factor_temporal,
        height=height,
        width=width,
        dtype=torch.float32,
        device=device,
        generator=torch.Generator().manual_seed(0),
        latents=torch.zeros((), device=device),  # of no concern: only what comes of the picture is kept
    )
    return {"condition": condition}


def _cogvideox_image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """More channels for the picture, and in 1.5 a number that is always the same."""
    inputs = _cogvideox_inputs(pipe, noised, level, sample, call)
    inputs["hidden_states"] = torch.cat([noised, sample.image["condition"].to(noised)], dim=2)
    if pipe.transformer.config.ofs_embed_dim is not None:
        inputs["ofs"] = noised.new_full((1,), 2.0)
    return inputs


COGVIDEOX_IMAGE = replace(
    COGVIDEOX, pipelines=("CogVideoXImageToVideoPipeline",), inputs=_cogvideox_image_inputs, image=_cogvideox_image
)
