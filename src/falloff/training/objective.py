"""What a model is asked in training, and how far its answer is from the target.

    loss = || v(x_s, s) - target ||^2

in a model's own terms (see ``noising``), with the sparse attention that it has at this noise level in inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from falloff.hosts import standing as seam
from falloff.training.family import Family, Sample
from falloff.training.noising import Noising, Weights

FIXED_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels of the validation loss, as shares of a transformer's range; the same from one time to the next."""


@dataclass(frozen=True)
class Point:
    """A sample at a noise level, with its noise: what one forward of the transformer is asked about."""

    sample: Sample
    noise: Tensor
    noising: Noising
    level: float

    @property
    def noised(self) -> Tensor:
        return self._mixed(self.noising.mix(self.level))

    @property
    def target(self) -> Tensor:
        """The velocity of the frames that are to be denoised."""
        return self.asked(self._mixed(self.noising.aim(self.level)))

    def asked(self, x: Tensor) -> Tensor:
        """The frames that are to be denoised, of latents [1, C, F, H, W] or of tokens [1, N, C]."""
        given = self.sample.given
        return x[:, given * x.shape[1] // self.sample.size[0] :] if x.ndim == 3 else x[:, :, given:]

    def _mixed(self, weights: Weights) -> Tensor:
        return weights[0] * self.sample.latents + weights[1] * self.noise


def point_at(sample: Sample, noising: Noising, level: float, generator: torch.Generator) -> Point:
    """Noise comes from the CPU's generator, so that every machine draws the same."""
    noise = torch.randn(sample.latents.shape, generator=generator).to(sample.latents)
    return Point(sample, noise, noising, level)


def velocity(pipe: Any, family: Family, model: Any, point: Point, call: Mapping[str, Any]) -> Tensor:
    """What the transformer takes for the velocity where it is asked, in float32, with its sparse attention as at this
    noise level.

    Everything goes in as the model's own type, as pipelines hand it over.
    """
    dtype = model.dtype
    level = torch.tensor([point.level], device=point.noise.device)
    text = {name: x.to(dtype) if x.is_floating_point() else x for name, x in point.sample.text.items()}
    given = {**family.inputs(pipe, point.noised.to(dtype), level, point.sample, call), **text}
    with seam.standing(model, point.noising.position(point.level)):
        out: Tensor = model(**given, return_dict=False)[0]
    return family.velocity * point.asked(out).float()


def flow_loss(velocity: Tensor, point: Point) -> Tensor:
    """Mean squared error of a velocity, 0-d."""
    return mse_loss(velocity, point.target.float())


def validation_points(samples: list[Sample], noising: Noising, seed: int) -> list[Point]:
    """The same noise at the same levels of every transformer, whenever it is asked."""
    generator = torch.Generator().manual_seed(seed)
    levels = [low + share * (high - low) for low, high in noising.ranges.values() for share in FIXED_LEVELS]
    return [point_at(sample, noising, level, generator) for sample in samples for level in levels]
