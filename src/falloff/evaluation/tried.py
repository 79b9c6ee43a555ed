"""What a search has tried, and which of it is best by all that was timed.

One run's time varies by a tenth and more on a machine that does other things too, so that the fastest of many single
runs is the luckiest. What sparsity saves is nearly a line in effective density: how steep it is, all runs tell
together, and where it begins, those of one method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any, Literal

import numpy as np

from falloff.evaluation.candidates import Candidate
from falloff.evaluation.study import Judgement, TuningError

SHOWN_OF_A_VALUE = 60
"""Letters of a setting's value that are told."""


@dataclass(frozen=True)
class Goal:
    """At least ``target``: mean PSNR in dB against dense, or the share of attention kept, 0 to 1."""

    measure: Literal["psnr", "recall"]
    target: float

    def __post_init__(self) -> None:
        if self.measure == "recall" and not 0 < self.target < 1:
            raise TuningError(f"a recall of {self.target} is outside 0 to 1")
        if not self.target > 0:
            raise TuningError(f"a target of {self.target} must be above 0")

    def __str__(self) -> str:
        return f"{self.target:g} dB PSNR" if self.measure == "psnr" else f"{self.target:.1%} of attention kept"


@dataclass(frozen=True)
class Tried:
    """A candidate with its judgement. alike: what it has in common with others that are as costly at equal density:
    the method's name first, then those of its settings that are chosen rather than turned."""

    candidate: Candidate
    judged: Judgement
    alike: tuple[str, ...]

    def words(self) -> str:
        """The method, what differs from its defaults, and its schedule."""
        method, schedule = self.candidate.method, self.candidate.schedule
        defaults = type(method)().settings()
        changed = [f"{name}={_short(value)}" for name, value in method.settings().items() if value != defaults[name]]
        return " ".join(
            [method.name, *changed, f"dense_first={schedule.dense_first}", f"dense_layers={schedule.dense_layers}"]
        )


def alike(parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Of a trial's parameters those that say how pairs are computed, not how many."""
    knobs = sorted((name, value) for name, value in parameters.items() if "." in name)
    return str(parameters["method"]), *(f"{name}={value}" for name, value in knobs if not isinstance(value, float))


def costs(tried: Sequence[Tried]) -> list[float]:
    """The cost of each by all times together: least squares of ``cost = 1 - slope (1 - density) + own``.

    ``own``, what is spent beside the pairs, is a number for every method and one for each of its ways to compute them,
    which is drawn towards 0 as if it had been timed once at 0, so that a single lucky run is believed by half. Where
    times do not fall with density, they are what they are.
    """
    judged = np.array([each.judged for each in tried], dtype=np.float64).reshape(-1, 3)
    methods = _columns([each.alike[:1] for each in tried])
    ways = _columns([each.alike for each in tried])
    terms = np.hstack([judged[:, 1:2] - 1, methods, ways])
    drawn = np.hstack([np.zeros((ways.shape[1], 1 + methods.shape[1])), np.eye(ways.shape[1])])
    measured = np.concatenate([judged[:, 0] - 1, np.zeros(len(drawn))])
    found = np.linalg.lstsq(np.vstack([terms, drawn]), measured, rcond=None)[0]
    fitted = 1 + terms @ found
    return [float(cost) for cost in (fitted if found[0] > 0 else judged[:, 0])]


def best(tried: Sequence[Tried], goal: Goal) -> Tried:
    """The least costly that reached the goal. Raises ``TuningError`` where none did."""
    reached = [
        (cost, number) for number, cost in enumerate(costs(tried)) if tried[number].judged.fidelity >= goal.target
    ]
    if not reached:
        closest = max(each.judged.fidelity for each in tried)
        unit = " dB" if goal.measure == "psnr" else ""
        raise TuningError(
            f"none of {len(tried)} candidates reached {goal}; the closest had {closest:.3g}{unit}. "
            "Allow more time, or lower the target"
        )
    return tried[min(reached)[1]]


def _columns(names: Sequence[tuple[str, ...]]) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """A column for every name, 1 where it stands."""
    distinct = list(dict.fromkeys(names))
    return np.array([[float(name == each) for each in distinct] for name in names])


def _short(value: Any) -> str:
    """Tables of layers and heads are for the recipe."""
    return shorten(str(value), SHOWN_OF_A_VALUE, placeholder=" ...")
