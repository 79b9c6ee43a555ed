"""The ways from a clean latent to noise on which models are trained, and the steps that a sampler takes on them.

    x_s = a x_0 + b noise,     target = a' x_0 + b' noise

A flow goes in a straight line, a = 1 - s and b = s, and its model puts out the velocity noise - x_0. s is logit-normal
(arXiv:2403.03206, section 3.1), shifted as the scheduler shifts its levels: s' = shift s / (1 + (shift - 1) s).

A diffusion goes along a circle, a = sqrt(alpha), b = sqrt(1 - alpha), with alpha of the scheduler's table, and its
model puts out the velocity there, sqrt(alpha) noise - sqrt(1 - alpha) x_0 (arXiv:2202.00512, section 4), or the noise
(arXiv:2006.11239). The steps of its table are drawn alike.

Where a schedule keeps some of the sampler's steps dense, a level counts as the step whose own level is nearest. Where a
pipeline has two transformers, a level is the lesson of the one that the pipeline has at work there.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from falloff.api import TRANSFORMERS
from falloff.session import Position
from falloff.training.errors import TrainingError
from falloff.training.family import Family

FIRST, SECOND = TRANSFORMERS
"""What pipelines call the transformer of all noise levels, or of the higher, and that of the lower."""
Weights = tuple[float, float]
"""Of the clean latent, and of the noise."""


@dataclass(frozen=True, kw_only=True)
class Noising(ABC):
    """``levels``: noise levels of the sampler's steps, in 0 to 1 and highest first. ``boundary``: the level below which
    the second transformer is at work, if there is one."""

    levels: tuple[float, ...]
    boundary: float = 0.0

    @abstractmethod
    def draw(self, generator: torch.Generator) -> float:
        """A noise level in 0 to 1."""

    @abstractmethod
    def mix(self, level: float) -> Weights:
        """What x_s is made of."""

    @abstractmethod
    def aim(self, level: float) -> Weights:
        """What the model's target is made of."""

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The noise levels of each transformer at work, by the pipeline's name for it."""
        if not self.boundary:
            return {FIRST: (0.0, 1.0)}
        return {FIRST: (self.boundary, 1.0), SECOND: (0.0, self.boundary)}

    def expert(self, level: float) -> str:
        """The name of the transformer that is at work at a noise level."""
        return SECOND if level < self.boundary else FIRST

    def position(self, level: float) -> Position:
        """The step of the sampler that is nearest to a noise level."""
        step = min(range(len(self.levels)), key=lambda i: abs(self.levels[i] - level))
        return Position(step=step, steps=len(self.levels), branch="cond")


@dataclass(frozen=True, kw_only=True)
class Flow(Noising):
    """A straight line. ``shift``: of the levels that are drawn."""

    shift: float

    def draw(self, generator: torch.Generator) -> float:
        s = float(torch.sigmoid(torch.randn((), generator=generator)))
        return self.shift * s / (1 + (self.shift - 1) * s)

    def mix(self, level: float) -> Weights:
        return 1 - level, level

    def aim(self, level: float) -> Weights:
        return -1.0, 1.0


@dataclass(frozen=True, kw_only=True)
class Diffusion(Noising):
    """A quarter of a circle. ``alphas``: the scheduler's table, whose step t is at the noise level t / (T - 1).
    ``predicts``: what the model puts out, as schedulers name it."""

    alphas: tuple[float, ...]
    predicts: Literal["v_prediction", "epsilon"] = "v_prediction"

    def draw(self, generator: torch.Generator) -> float:
        return int(torch.randint(len(self.alphas), (), generator=generator)) / (len(self.alphas) - 1)

    def mix(self, level: float) -> Weights:
        alpha = self.alphas[round(level * (len(self.alphas) - 1))]
        return math.sqrt(alpha), math.sqrt(1 - alpha)

    def aim(self, level: float) -> Weights:
        if self.predicts == "epsilon":
            return 0.0, 1.0
        clean, noise = self.mix(level)
        return -noise, clean


def noising_of(pipe: Any, family: Family, steps: int, call: Mapping[str, Any]) -> Noising:
    """The path of a pipeline, with the levels of ``steps`` steps of its scheduler for a call of this size.

    Raises ``TrainingError`` for a scheduler of another path than the family's.
    """
    scheduler = copy.deepcopy(pipe.scheduler)
    return (
        _diffusion(scheduler, family, pipe, steps, call)
        if family.diffuses
        else _flow(scheduler, family, pipe, steps, call)
    )


def _flow(scheduler: Any, family: Family, pipe: Any, steps: int, call: Mapping[str, Any]) -> Flow:
    config = scheduler.config
    straight = "FlowMatch" in type(scheduler).__name__ or config.get("prediction_type") == "flow_prediction"
    if not straight:
        raise TrainingError(
            f"{type(scheduler).__name__} with prediction_type={config.get('prediction_type')!r} is no flow-matching "
            f"scheduler, and {type(pipe).__name__} is trained by flow matching"
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
    shift = float((config.get("flow_shift") or config.get("shift") or 1.0) if dynamic is None else math.exp(dynamic))
    return Flow(shift=shift, levels=tuple(levels.tolist()), boundary=family.boundary(pipe))


def _diffusion(scheduler: Any, family: Family, pipe: Any, steps: int, call: Mapping[str, Any]) -> Diffusion:
    predicted = scheduler.config.get("prediction_type")
    assert family.diffuses is not None
    if predicted != family.diffuses or not hasattr(scheduler, "alphas_cumprod"):
        raise TrainingError(
            f"{type(scheduler).__name__} with prediction_type={predicted!r} is no diffusion scheduler of the kind that "
            f"{type(pipe).__name__} is trained with, {family.diffuses!r}; use the scheduler of its checkpoint"
        )
    scheduler.set_timesteps(**family.timetable(pipe, steps, call))
    alphas = scheduler.alphas_cumprod.tolist()
    levels = tuple(t / (len(alphas) - 1) for t in scheduler.timesteps.tolist())
    return Diffusion(alphas=tuple(alphas), predicts=predicted, levels=levels, boundary=family.boundary(pipe))
