"""Where ``tune`` looks: the knobs of methods, and which steps and layers stay dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from falloff.methods.base import Choices, Method, Span
from falloff.schedule import Schedule, count

if TYPE_CHECKING:
    from optuna.trial import Trial

DENSE_FIRST = (0.0, 0.4, 0.05)
"""Shares of the first steps that may stay dense: least, most, and the distance between those tried."""
DENSE_LAYERS = 1 / 3
"""The largest share of layers that may stay dense."""


@dataclass(frozen=True)
class Candidate:
    """Settings to judge."""

    method: Method
    schedule: Schedule

    def mean(self, by_layer: dict[int, float], steps: int) -> float:
        """Mean over all layers and steps of what the plans keep or compute of a whole: 1 where a call stays dense."""
        dense = self.schedule.dense_of(len(by_layer))
        sparse_steps = fmean(1.0 if layer in dense else value for layer, value in by_layer.items())
        share = (count(self.schedule.dense_first, steps) + count(self.schedule.dense_last, steps)) / steps
        return share + (1 - share) * sparse_steps


@dataclass(frozen=True)
class Space:
    """All candidates of some kinds of methods. ``sensitive``: layers, those that lose most by sparsity first."""

    kinds: Sequence[type[Method]]
    sensitive: Sequence[int]

    def suggest(self, trial: Trial) -> Candidate:
        """The candidate of a trial. Raises ``ValueError`` for settings that exclude each other."""
        name = trial.suggest_categorical("method", [kind.name for kind in self.kinds])
        kind = next(kind for kind in self.kinds if kind.name == name)
        settings = {knob: _value(trial, f"{name}.{knob}", where) for knob, where in kind.knobs.items()}
        least, most, step = DENSE_FIRST
        share = trial.suggest_float("dense_first", least, most, step=step)
        dense = trial.suggest_int("dense_layers", 0, max(1, int(DENSE_LAYERS * len(self.sensitive))))
        layers = tuple(sorted(self.sensitive[:dense]))
        return Candidate(kind(**settings), Schedule(dense_first=round(share, 3), dense_layers=layers))

    def defaults(self, kind: type[Method]) -> dict[str, Any]:
        """The point of the space next to a method's defaults."""
        made, schedule = kind(), kind.schedule
        values = {knob: getattr(made, knob) for knob in kind.knobs}
        settings = {
            f"{kind.name}.{knob}": str(value) if isinstance(kind.knobs[knob], Choices) else value
            for knob, value in values.items()
        }
        share = schedule.dense_first if isinstance(schedule.dense_first, float) else 0.25
        return {
            "method": kind.name,
            **settings,
            "dense_first": share,
            "dense_layers": min(1, len(schedule.dense_of(len(self.sensitive)))),
        }


def _value(trial: Trial, name: str, knob: Span | Choices) -> Any:
    if isinstance(knob, Choices):
        values = {str(value): value for value in knob.values}  # optuna keeps plain values alone
        return values[trial.suggest_categorical(name, list(values))]
    if isinstance(knob.low, int) and isinstance(knob.high, int):
        return trial.suggest_int(name, knob.low, knob.high, log=knob.log)
    return trial.suggest_float(name, knob.low, knob.high, log=knob.log)
