"""Where a method's dial meets a goal: from its defaults on by halving, since fidelity rises with density.

A sampler knows nothing of that and would need many more candidates. What is found here it goes on from.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from falloff.methods.base import Method, Span

TURNS = 4
"""Of one dial, at most."""
CLOSE = 0.06
"""Share of a dial's span within which its place is known well enough."""


class Dial(NamedTuple):
    """A knob by its name in the space, and whether its high end is the sparse one."""

    name: str
    span: Span
    falling: bool

    def value(self, place: float) -> float:
        """From the place between sparse, 0, and dense, 1."""
        low, high = self._ends()
        share = 1 - place if self.falling else place
        middle = math.exp(low + share * (high - low)) if self.span.log else low + share * (high - low)
        return min(max(round(middle, 4), self.span.low), self.span.high)

    def place(self, value: float) -> float:
        low, high = self._ends()
        share = ((math.log(value) if self.span.log else value) - low) / (high - low)
        return 1 - share if self.falling else share

    def _ends(self) -> tuple[float, float]:
        ends = self.span.low, self.span.high
        return (math.log(ends[0]), math.log(ends[1])) if self.span.log else ends


def ends_of_dials(kinds: Sequence[type[Method]]) -> list[Method]:
    """Of every kind that has a dial, its defaults with the dial at its low and at its high end."""
    return [
        replace(kind(), **{kind.dial: end})
        for kind in kinds
        if kind.dial is not None
        for end in (_span(kind).low, _span(kind).high)
    ]


def dials(ends: Sequence[Method], densities: Sequence[float]) -> dict[type[Method], Dial]:
    """By kind, from what ``ends_of_dials`` gave and how dense it is."""
    found = {}
    for low in range(0, len(ends), 2):
        kind = type(ends[low])
        found[kind] = Dial(f"{kind.name}.{kind.dial}", _span(kind), densities[low] > densities[low + 1])
    return found


def _span(kind: type[Method]) -> Span:
    span = kind.knobs[str(kind.dial)]
    assert isinstance(span, Span)  # what a dial is
    return span


def next_turn(
    dial: Dial, start: Mapping[str, Any], judged: Sequence[tuple[Mapping[str, Any], float]], target: float
) -> dict[str, Any] | None:
    """``start`` with its dial halfway between the sparsest that reached the target and the densest below that did not.

    ``judged``: parameters and fidelity of what was tried, of which those count that differ in the dial alone. ``None``
    before the start was judged, and when the place is known or the dial was turned often enough.
    """
    others = {name: value for name, value in start.items() if name != dial.name}
    along = [
        (dial.place(params[dial.name]), fidelity)
        for params, fidelity in judged
        if {name: value for name, value in params.items() if name != dial.name} == others
    ]
    if not 1 <= len(along) <= TURNS:
        return None
    dense = min((place for place, fidelity in along if fidelity >= target), default=1.0)
    sparse = max((place for place, fidelity in along if fidelity < target), default=0.0)
    if dense - sparse < CLOSE:
        return None
    return {**start, dial.name: dial.value((sparse + dense) / 2)}
