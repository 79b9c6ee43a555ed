"""Steps, or layers, that did the same kind of thing, told in one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from falloff.reporting.record import Record

REASONS_TOLD = 3
"""Reasons named in one line."""


class Stretch(NamedTuple):
    """Neighbouring steps or layers, and what their calls did."""

    first: int | None
    last: int | None
    words: str

    @property
    def name(self) -> str:
        if self.first is None:
            return "unknown"
        return str(self.first) if self.first == self.last else f"{self.first} to {self.last}"


def by_step(calls: Sequence[Record]) -> list[Stretch]:
    """Steps in order; those nobody could tell come last."""
    return _stretches(calls, lambda call: call.step)


def by_layer(calls: Sequence[Record]) -> list[Stretch]:
    """Layers in order, those of several models together."""
    return _stretches(calls, lambda call: call.layer)


def _stretches(calls: Sequence[Record], place: Callable[[Record], int | None]) -> list[Stretch]:
    at: dict[int | None, list[Record]] = {}
    for call in calls:
        at.setdefault(place(call), []).append(call)
    places = sorted(at, key=lambda found: (found is None, found or 0))
    found = []
    for _, group in groupby(places, key=lambda here: (here is None, _kind(at[here]))):
        members = list(group)
        found.append(Stretch(members[0], members[-1], _words([call for here in members for call in at[here]])))
    return found


def _kind(calls: Sequence[Record]) -> frozenset[str | None]:
    """Reasons of dense calls, and ``None`` where there are sparse ones."""
    return frozenset(call.reason for call in calls)


def _words(calls: Sequence[Record]) -> str:
    sparse = [call for call in calls if call.reason is None]
    dense = [call for call in calls if call.reason is not None]
    reasons = _several(list(dict.fromkeys(call.reason for call in dense if call.reason is not None)))
    if not sparse:
        return f"dense ({reasons}){_time(dense)}"
    least, most = (f"{pick(call.density for call in sparse):.1%}" for pick in (min, max))
    words = f"{least if least == most else f'{least} to {most}'} of the pairs{_time(sparse)}"
    return f"{words}; {len(dense)} of {len(calls)} calls dense ({reasons}){_time(dense)}" if dense else words


def _several(reasons: list[str]) -> str:
    more = len(reasons) - REASONS_TOLD
    return ", ".join(reasons[:REASONS_TOLD]) + (f" and {more} more reasons" if more > 0 else "")


def _time(calls: Sequence[Record]) -> str:
    times = [call.attention_seconds for call in calls if call.attention_seconds is not None]
    return f", {1000 * fmean(times):.3g} ms a call" if times else ""
