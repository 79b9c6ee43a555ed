"""One record a self-attention call, and the watch that times it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


class Stopwatch:
    """Seconds between start and stop on a device, read later so that nothing waits for the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._stop: float | torch.cuda.Event | None = None

    def stop(self) -> Stopwatch:
        self._stop = self._mark()
        return self

    def seconds(self) -> float | None:
        """``None`` while it runs. On a GPU this waits for the work that was timed."""
        if self._stop is None:
            return None
        if isinstance(self._start, float) or isinstance(self._stop, float):
            return float(self._stop) - float(self._start)  # type: ignore[arg-type]  # both are floats or neither
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch left it untyped
        event.record()
        return event


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one self-attention call did. ``reason``: why it stayed dense, ``None`` when a plan computed it.

    Seconds of attention are ``None`` unless timed; those of planning are the host's.
    """

    run: int
    step: int | None
    model: int
    layer: int
    branch: str | None
    density: float
    kernel: str
    reason: str | None
    plan_seconds: float
    attention_seconds: float | None
