"""Flow matching in a model's own terms, at noise levels drawn as its sampler visits them.

    x_s = (1 - s) x_0 + s noise,     loss = || v(x_s, s) - (noise - x_0) ||^2

s is logit-normal (arXiv:2403.03206, section 3.1), shifted as the scheduler shifts its levels:
s' = shift s / (1 + (shift - 1) s). Where a schedule keeps some of the sampler's steps dense, a drawn level counts as
the step whose own level is nearest. Where a pipeline has two transformers, a level is the lesson of the one that the
pipeline has at work there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from falloff.api import TRANSFORMERS
from falloff.hosts import standing as seam
from falloff.session import Position
from falloff.training.errors import TrainingError
from falloff.training.families import Family, Sample

FIXED_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Noise levels of the validation loss, as shares of a transformer's range; the same from one time to the next."""
FIRST, SECOND = TRANSFORMERS
"""What pipelines call the transformer of all noise levels, or of the higher, and that of the lower."""


@dataclass(frozen=True)
class Flow:
    """A sampler's noise levels, highest first, the shift behind them, and the level below which the second transformer
    is at work, if there is one."""

    shift: float
    levels: tuple[float, ...]
    boundary: float = 0.0

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The noise levels of each transformer at work, by the pipeline's name for it."""
        if not self.boundary:
            return {FIRST: (0.0, 1.0)}
        return {FIRST: (self.boundary, 1.0), SECOND: (0.0, self.boundary)}

    def expert(self, level: float) -> str:
        """The name of the transformer that is at work at a noise level."""
        return SECOND if level < self.boundary else FIRST

    def draw(self, generator: torch.Generator) -> float:
        """A noise level in 0 to 1."""
        s = float(torch.sigmoid(torch.randn((), generator=generator)))
        return self.shift * s / (1 + (self.shift - 1) * s)

    def position(self, level: float) -> Position:
        """The step of the sampler that is nearest to a noise level."""
        step = min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - level))
        return Position(step=step, steps=len(self.levels), branch="cond")


def flow_of(pipe: Any, family: Family, steps: int, call: Mapping[str, Any]) -> Flow:
    """The levels of ``steps`` steps of a pipeline's scheduler, for a call of this size.

    Raises ``TrainingError`` for a scheduler that does not follow straight flows, as one that predicts noise.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    config = scheduler.config
    straight = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
    if not straight:
        raise TrainingError(
            f"{type(scheduler).__name__} with prediction_type={config.get('prediction_type')!r} is no flow-matching "
            "scheduler, and only models of flow matching can be trained here"
        )
    table = family.timetable(pipe, steps, call)
    if config.get("use_dynamic_shifting") and "mu" not in table:
        raise TrainingError(
            f"{type(scheduler).__name__} shifts its noise levels with the size of the video (use_dynamic_shifting), "
            f"which {type(pipe).__name__} does not tell it; give it a fixed shift"
        )
    dynamic = table["mu"] if config.get("use_dynamic_shifting") else None
    scheduler.set_timesteps(**table)
    sigmas = scheduler.sigmas[:steps]
    levels = 1 - sigmas if config.get("invert_sigmas") else sigmas
    shift = config.get("flow_shift") or config.get("shift") or 1.0
    shift = float(shift if dynamic is None else math.exp(dynamic))
    return Flow(shift, tuple(levels.tolist()), family.boundary(pipe))


@dataclass(frozen=True)
class Point:
    """A sample at a noise level, with its noise: what one forward of the transformer is asked about."""

    sample: Sample
    noise: Tensor
    level: float

    @property
    def noised(self) -> Tensor:
        return (1 - self.level) * self.sample.latents + self.level * self.noise

    @property
    def target(self) -> Tensor:
        """The velocity, noise - x_0, of the frames that are to be denoised."""
        return self.asked(self.noise - self.sample.latents)

    def asked(self, x: Tensor) -> Tensor:
        """The frames that are to be denoised."""
        return x[:, :, self.sample.given :]


def point_at(sample: Sample, level: float, generator: torch.Generator) -> Point:
    """Noise comes from the CPU's generator, so that every machine draws the same."""
    noise = torch.randn(sample.latents.shape, generator=generator).to(sample.latents)
    return Point(sample, noise, level)


def velocity(pipe: Any, family: Family, model: Any, flow: Flow, point: Point, call: Mapping[str, Any]) -> Tensor:
    """What the transformer takes for noise - x_0 where it is asked, in float32, with its sparse attention as at this
    noise level.

    Everything goes in as the model's own type, as pipelines hand it over.
    """
    dtype = model.dtype
    level = torch.tensor([point.level], device=point.noise.device)
    text = {name: x.to(dtype) if x.is_floating_point() else x for name, x in point.sample.text.items()}
    given = {**family.inputs(pipe, point.noised.to(dtype), level, point.sample, call), **text}
    with seam.standing(model, flow.position(point.level)):
        out: Tensor = model(**given, return_dict=False)[0]
    return family.velocity * point.asked(out).float()


def flow_loss(velocity: Tensor, point: Point) -> Tensor:
    """Mean squared error of a velocity, 0-d."""
    return mse_loss(velocity, point.target.float())


def validation_points(samples: list[Sample], flow: Flow, seed: int) -> list[Point]:
    """The same noise at the same levels of every transformer, whenever it is asked."""
    generator = torch.Generator().manual_seed(seed)
    levels = [low + share * (high - low) for low, high in flow.ranges.values() for share in FIXED_LEVELS]
    return [point_at(sample, level, generator) for sample in samples for level in levels]
