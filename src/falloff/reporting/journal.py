"""What is noted during a run: little for each call, because it is noted in the middle of the model's work."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from falloff.reporting.record import Record, Stopwatch

RECORDS_KEPT = 100_000
"""Bound on the memory of a run that never ends, as training without a pipeline is one."""


class Note(NamedTuple):
    """A ``Record`` to be: a tuple takes a fraction of the time to make, and its watch need not have been read yet."""

    run: int
    step: int | None
    model: int
    layer: int
    branch: str | None
    density: float
    kernel: str
    reason: str | None
    plan_seconds: float
    watch: Stopwatch | None


class Journal:
    """The self-attention calls and the root forwards of a run, the latest of them where there are very many."""

    def __init__(self) -> None:
        self.calls: deque[Note] = deque(maxlen=RECORDS_KEPT)
        self.forwards: deque[Stopwatch] = deque(maxlen=RECORDS_KEPT)

    def clear(self) -> None:
        self.calls.clear()
        self.forwards.clear()

    def records(self) -> list[Record]:
        """What the calls did. Waits for the device when they were timed."""
        return [_record(note) for note in self.calls]

    def forward_seconds(self) -> float:
        return sum(watch.seconds() or 0.0 for watch in self.forwards)


def _record(note: Note) -> Record:
    values = note._asdict()
    watch: Stopwatch | None = values.pop("watch")
    return Record(**values, attention_seconds=watch.seconds() if watch is not None else None)
