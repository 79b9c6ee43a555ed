"""Progress of a long run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Steps:
    """Shows "step x of y" and the time left on stderr, while in a ``with`` block.

    ``unit``: what is counted; empty where that changes with what is going on. ``quiet``: show nothing.
    """

    def __init__(self, doing: str, unit: str = "step", *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, quiet=quiet)
        self._doing, self._unit, self._total = doing, unit, 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[steps]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._start = self._said = time.monotonic()
        self._first = 0

    def __enter__(self) -> Steps:
        self._bar.start()
        self._task = self._bar.add_task(self._doing, total=None, steps="")
        self._say(self._doing)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def show(self, doing: str, done: int = 0, total: int | None = None, detail: str = "") -> None:
        """Tell what is going on, the steps done where they are counted, and what may be told from time to time."""
        assert self._task is not None
        steps = f"{self._unit} {done} of {total}{detail and f', {detail}'}".lstrip() if total else ""
        if total and total != self._total:
            self._bar.reset(self._task)
            self._start, self._first, self._total = time.monotonic(), done, total
        self._bar.update(self._task, description=doing, completed=done, total=total, steps=steps)
        if doing != self._doing or time.monotonic() - self._said > SECONDS_BETWEEN_LINES:
            self._doing = doing
            self._say(f"{doing}, {steps}{self._left(done, total)}" if total else doing)

    def _left(self, done: int, total: int | None) -> str:
        made = done - self._first
        if made <= 0 or not total:
            return ""
        left = (time.monotonic() - self._start) / made * (total - done)
        return f", about {left:.0f} s left"

    def _say(self, line: str) -> None:
        if not self._console.is_terminal:
            self._said = time.monotonic()
            self._console.print(line, highlight=False, soft_wrap=True)
