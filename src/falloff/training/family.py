"""What a training asks of a family of pipelines: its transformer's arguments for a noised clip, and all around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

Text = dict[str, Tensor]
"""Everything of a forward's arguments that comes from the caption."""
Call = Mapping[str, Any]
"""Arguments of the pipeline call that is trained for."""
Size = tuple[int, int, int]
"""Of the autoencoder's latents: frames, height, width."""


@dataclass(frozen=True)
class Sample:
    """One clip: latents as the family makes them, the autoencoder's latent size, and the caption's text.

    image: what a pipeline that begins with a picture makes of the clip's first. given: how many latent frames the
    pipeline takes from that picture, and does not denoise.
    """

    latents: Tensor
    size: Size
    text: Text
    image: Text = field(default_factory=dict)
    given: int = 0


@dataclass(frozen=True, kw_only=True)
class Family:
    """``temporal``: video frames of one latent frame.

    encode: a video [1, 3, F, H, W] in -1 to 1 by the autoencoder, whose latents are [1, C, F, H, W]. latents: from
    these, as the pipeline denoises them, any shape that begins with 1. text: of a caption and, where a video begins
    with it, the picture in the call's ``image``. inputs: arguments of the transformer's forward but the text's, for
    noised latents, the noise level [1] and the clip that they are of. velocity: +1 when the transformer puts out the
    velocity towards noise, -1 for that towards the clip. timetable: what the pipeline gives its scheduler for a number
    of steps. image: what the pipeline makes of the picture that a video of this call begins with, where it takes one.
    given: how many latent frames it takes from that picture, and does not denoise. boundary: the noise level below
    which a second transformer is at work, or 0. diffuses: for a family that is trained by diffusion rather than flow
    matching, what its transformer puts out, as schedulers name it. refuse: why a pipeline of the family cannot be
    trained, if it cannot. unfit: why videos of the size of a call cannot be trained on.
    """

    pipelines: tuple[str, ...]
    temporal: Callable[[Any], int]
    encode: Callable[[Any, Tensor], Tensor] = lambda vae, video: vae.encode(video).latent_dist.mode()
    latents: Callable[[Any, Tensor], Tensor]
    text: Callable[[Any, str, Call], Text]
    inputs: Callable[[Any, Tensor, Tensor, Sample, Call], dict[str, Any]]
    velocity: int = 1
    timetable: Callable[[Any, int, Call], dict[str, Any]] = lambda pipe, steps, call: {"num_inference_steps": steps}
    image: Callable[[Any, Image, Call], Text] | None = None
    given: Callable[[Any], int] = lambda pipe: 0
    boundary: Callable[[Any], float] = lambda pipe: 0.0
    diffuses: Literal["v_prediction", "epsilon"] | None = None
    refuse: Callable[[Any], str | None] = lambda pipe: None
    unfit: Callable[[Any, Call], str | None] = lambda pipe, call: None


def normalised(latents: Tensor, config: Any, scale: float = 1.0) -> Tensor:
    """(latents - mean) / std of every channel, times ``scale``; without statistics of the autoencoder only that."""
    if config.get("latents_mean") is None or config.get("latents_std") is None:
        return latents * scale
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=latents.dtype).view(1, -1, 1, 1, 1)
        for values in (config["latents_mean"], config["latents_std"])
    )
    return (latents - mean) / std * scale


def shifted_by_size(
    scheduler: Any, tokens: int, steps: int, *, few: int = 256, least: float = 0.5, most: float = 1.15
) -> dict[str, Any]:
    """What a pipeline gives a scheduler that shifts its levels more for more tokens, along a line between two sizes.

    few, least, most: where the line begins, and the shifts at its ends, unless the scheduler has its own.
    """
    config = scheduler.config
    few, many = config.get("base_image_seq_len", few), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", least), config.get("max_shift", most)
    mu = least + (most - least) * (tokens - few) / (many - few)
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}
