"""What is noted during a run: little for each call, because it is noted in the middle of the model's work."""

from __future__ import annotations

from collections import deque

from falloff.reporting.record import Record, Stopwatch

RECORDS_KEPT = 100_000
"""Bound on the memory of a run that never ends, as training without a pipeline is one."""

Note = tuple[int, int | None, int, int, str | None, float, str, str | None, float, Stopwatch | None]
"""A ``Record`` to be: run, step, model, layer, branch, density, kernel, reason, seconds of planning, and a watch to be
read later. A plain tuple takes a tenth of the time to make, and Python's garbage collector does not look through it."""


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
    run, step, model, layer, branch, density, kernel, reason, plan_seconds, watch = note
    return Record(
        run=run,
        step=step,
        model=model,
        layer=layer,
        branch=branch,
        density=density,
        kernel=kernel,
        reason=reason,
        plan_seconds=plan_seconds,
        attention_seconds=watch.seconds() if watch is not None else None,
    )
