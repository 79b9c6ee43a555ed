"""What a comparison of ways to decode found, as plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falloff.evaluation.comparison import jsonable
from falloff.evaluation.decay import DecayCurve


@dataclass(frozen=True)
class Asked:
    """One class and seed; every list of an arm has one entry for each, in this order."""

    label: int
    seed: int


@dataclass(frozen=True)
class Scores:
    """What a judge says of an arm's pictures, all together."""

    pictures: int
    accuracy: float
    """Share read as the class asked for."""
    frechet: float | None
    """Frechet distance to real pictures in the judge's features; ``None`` where too few pictures were drawn."""


@dataclass(frozen=True)
class Arm:
    """One way to decode: its order and groups, what it took, and what came out."""

    label: str
    order: str
    sizes: tuple[int, ...]
    """Tokens of each step."""
    seconds: list[float]
    """Of a picture, alone in its batch, pixels included."""
    peak_bytes: list[int | None]
    agreement: list[float] | None
    """Share of tokens that decoding one by one, in the same order and with the same draws, draws too; ``None`` where a
    judge tells more, and of the sequential arm.
    """
    scores: Scores | None
    flops: int
    """Of a picture's tokens, counted."""
    cache_bytes: int
    groups: NDArray[np.uint8] = dataclasses.field(repr=False)
    """At which step each token of a picture was decoded, [height, width]: 255 the first, 0 past the last."""
    pictures: list[bytes] = dataclasses.field(repr=False)
    """PNG files."""

    @property
    def steps(self) -> int:
        return len(self.sizes)


@dataclass(frozen=True)
class Comparison:
    """Sequential decoding and parallel ways on the same classes and seeds."""

    model: str
    command: str
    created: str
    """UTC, ISO 8601."""
    asked: list[Asked]
    call_arguments: dict[str, Any]
    sequential: Arm
    parallel: list[Arm]
    chance: float | None
    """Agreement of pictures that share their class alone; ``None`` where there is a judge."""
    attention: DecayCurve
    """Of the sequential pictures."""
    machine: dict[str, str]
    versions: dict[str, str]

    @property
    def arms(self) -> list[Arm]:
        return [self.sequential, *self.parallel]

    def speedups(self, arm: Arm) -> list[float]:
        """Sequential time / the arm's, picture by picture."""
        return [one / other for one, other in zip(self.sequential.seconds, arm.seconds, strict=True)]

    def speedup(self, arm: Arm) -> float:
        """Median over pictures."""
        return median(self.speedups(arm))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON; pictures are left out."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["asked"] = [dataclasses.asdict(each) for each in self.asked]
        values["attention"] = dataclasses.asdict(self.attention)
        values["sequential"] = self._values(self.sequential)
        values["parallel"] = [self._values(arm) for arm in self.parallel]
        plain: dict[str, Any] = jsonable(values)
        return plain

    def _values(self, arm: Arm) -> dict[str, Any]:
        values = dataclasses.asdict(dataclasses.replace(arm, pictures=[]))
        del values["pictures"], values["groups"]
        return {**values, "steps": arm.steps, "speedup": self.speedup(arm), "speedups": self.speedups(arm)}
