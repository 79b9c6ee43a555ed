"""How each family of pipelines trains: what its transformer is given, and what it is to put out for a noised latent.

All of them flow in straight lines, x_s = (1 - s) x_0 + s noise for the noise level s in 0 to 1, and differ in how
latents are normalised, how text goes in, how s is told, and in the sign of the velocity. Every file of diffusers'
pipelines does this backwards; tests hold the arguments made here against those a pipeline makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falloff.training.errors import TrainingError

Text = dict[str, Tensor]
"""Everything of a forward's arguments that comes from the caption."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """latents: from the autoencoder's [1, C, F, H, W], as the pipeline denoises them, any shape that begins with 1.

    text: of a caption, with those arguments of the pipeline call that bear on it. inputs: arguments of the
    transformer's forward but the text's, for noised latents, the noise level [1] and the size of the autoencoder's
    latents (frames, height, width). velocity: +1 when the transformer puts out noise - x_0, -1 for x_0 - noise.
    """

    pipelines: tuple[str, ...]
    latents: Callable[[Any, Tensor], Tensor]
    text: Callable[[Any, str, Mapping[str, Any]], Text]
    inputs: Callable[[Any, Tensor, Tensor, tuple[int, int, int]], dict[str, Any]]
    velocity: int = 1
    refuse: Callable[[Any], str | None] = lambda pipe: None


def family_of(pipe: Any) -> Family:
    """Raises ``TrainingError`` for a pipeline that cannot be trained here, with the reason."""
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            if (reason := family.refuse(pipe)) is not None:
                raise TrainingError(f"this {name} cannot be trained: {reason}")
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise TrainingError(f"{name} cannot be trained here; the pipelines that can are {known}")


def normalised(latents: Tensor, config: Any, scale: float = 1.0) -> Tensor:
    """(latents - mean) / std of every channel, times ``scale``, for an autoencoder that knows its statistics."""
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return (latents - mean) / std * scale


def _wan_text(pipe: Any, caption: str, call: Mapping[str, Any]) -> Text:
    embeds, _ = pipe.encode_prompt(
        caption, do_classifier_free_guidance=False, max_sequence_length=call.get("max_sequence_length", 512)
    )
    return {"encoder_hidden_states": embeds}


def _wan_refuse(pipe: Any) -> str | None:
    if getattr(pipe, "transformer_2", None) is not None:
        return "it has two experts (Wan 2.2 A14B), and a LoRA of one would leave the other as it was"
    return None


WAN = Family(
    pipelines=("WanPipeline",),
    latents=lambda pipe, latents: normalised(latents, pipe.vae.config),
    text=_wan_text,
    inputs=lambda pipe, noised, level, size: {"hidden_states": noised, "timestep": 1000 * level},
    refuse=_wan_refuse,
)


FAMILIES = (WAN,)
