"""What a method did in a run: one record a self-attention call, and the report made of them."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from falloff.methods.base import Method
from falloff.plan import Plan
from falloff.schedule import Schedule


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
            return float(self._stop) - float(self._start)  # type: ignore[arg-type]
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What a method did in the last run. ``str()`` is for reading, ``to_dict()`` for JSON."""

    method: Method
    schedule: Schedule
    calls: list[Record]
    forward_seconds: float | None
    """Of all root forwards; ``None`` unless timed."""
    plan: Plan | None
    """The last plan that was run."""
    choice: str | None
    """The kernel that ran it, why, and why not another."""

    @property
    def density(self) -> float:
        """Mean over the calls that a plan computed; 1 without any."""
        return _mean([call.density for call in self.calls if call.reason is None])

    @property
    def effective_density(self) -> float:
        """Mean over all calls, dense ones as 1; 1 without any."""
        return _mean([call.density for call in self.calls])

    @property
    def kernels(self) -> dict[str, int]:
        """Calls by kernel; dense calls by the model's own backend."""
        return dict(Counter(call.kernel for call in self.calls))

    @property
    def reasons(self) -> dict[str, int]:
        """Dense calls by reason."""
        return dict(Counter(call.reason for call in self.calls if call.reason is not None))

    @property
    def plan_seconds(self) -> float:
        return sum(call.plan_seconds for call in self.calls)

    @property
    def attention_seconds(self) -> float | None:
        """Of all self-attention calls, planning left out; ``None`` unless timed."""
        seconds = [call.attention_seconds for call in self.calls if call.attention_seconds is not None]
        return sum(seconds) if seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of the plan its pairs alone."""
        return {
            "method": self.method.name,
            "settings": self.method.settings(),
            "schedule": asdict(self.schedule),
            "density": self.density,
            "effective_density": self.effective_density,
            "kernels": self.kernels,
            "reasons": self.reasons,
            "plan_seconds": self.plan_seconds,
            "attention_seconds": self.attention_seconds,
            "forward_seconds": self.forward_seconds,
            "choice": self.choice,
            "calls": [asdict(call) for call in self.calls],
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{value}" for name, value in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("method", f"{self.method.name} {_settings(self.method.settings())}".rstrip())]
        lines.append(("schedule", _settings(asdict(self.schedule))))
        if not self.calls:
            return [*lines, ("calls", "none yet")]
        dense = sum(self.reasons.values())
        lines.append(("calls", f"{len(self.calls) - dense} sparse, {dense} dense"))
        lines.append(("density", f"{self.density:.1%} of the pairs in sparse calls"))
        lines.append(("effective density", f"{self.effective_density:.1%} with dense calls as 100%"))
        lines.append(("kernels", _settings(self.kernels)))
        lines += [("dense because", f"{reason}: {count} calls") for reason, count in self.reasons.items()]
        lines.append(("planning", f"{self.plan_seconds:.3f} s"))
        if self.attention_seconds is not None:
            lines.append(("attention", f"{self.attention_seconds:.3f} s"))
        if self.forward_seconds is not None:
            lines.append(("forwards", f"{self.forward_seconds:.3f} s"))
        if self.choice is not None:
            lines.append(("kernel", self.choice.replace("\n", "\n" + " " * 18)))
        return lines


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _mean(densities: list[float]) -> float:
    return sum(densities) / len(densities) if densities else 1.0
