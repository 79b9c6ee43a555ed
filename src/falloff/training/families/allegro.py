"""Allegro. Trained by diffusion, and puts out the noise; its autoencoder works in tiles alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from falloff.training.family import Call, Family, Sample, Text


def _text(pipe: Any, caption: str, call: Call) -> Text:
    """With an axis of one before the tokens."""
    length = call.get("max_sequence_length", 512)
    cleaned = call.get("clean_caption", True)
    embeds, mask, *_ = pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, max_sequence_length=length, clean_caption=cleaned
    )
    return {"encoder_hidden_states": embeds[:, None], "encoder_attention_mask": mask}


def _inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    last = pipe.scheduler.config.num_train_timesteps - 1
    positions = pipe._prepare_rotary_positional_embeddings
    return {
        "hidden_states": noised,
        "timestep": (last * level).round(),
        "image_rotary_emb": positions(1, call["height"], call["width"], sample.size[0], noised.device),
    }


def _refuse(pipe: Any) -> str | None:
    if pipe.vae.use_tiling:
        return None
    return "its autoencoder encodes and decodes in tiles alone; call pipe.vae.enable_tiling() first"


def _unfit(pipe: Any, call: Call) -> str | None:
    """Tiles lie side by side as often as they fit; what they do not reach would be no picture."""
    for name, tile, stride in zip(("num_frames", "height", "width"), pipe.vae.kernel, pipe.vae.stride, strict=True):
        more = max(0, call[name] - tile)
        if call[name] < tile or more % stride:
            below = tile + more // stride * stride
            near = f"{below} and {below + stride}" if call[name] > tile else str(tile)
            return f"tiles of {tile}, {stride} apart, do not cover {name} = {call[name]}; the nearest are {near}"
    return None


ALLEGRO = Family(
    pipelines=("AllegroPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: latents * pipe.vae.config.scaling_factor,
    text=_text,
    inputs=_inputs,
    diffuses="epsilon",
    refuse=_refuse,
    unfit=_unfit,
)
