"""What a method did in a run: in numbers, in words and as a picture."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from falloff.methods.base import Method
from falloff.plan import Plan
from falloff.reporting.picture import picture
from falloff.reporting.record import Record
from falloff.reporting.stretches import Stretch, by_layer, by_step
from falloff.schedule import Schedule

STRETCHES_TOLD = 6
"""Lines about steps, and about layers, in the report's words."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What a method did in the last run.

    ``str()`` is for reading, ``to_dict()`` for JSON, and ``picture()`` an SVG file of layers and steps.
    """

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

    def picture(self) -> str:
        """The run as an SVG file that needs nothing else: layers down, steps across, density as colour.

        Dense calls are hatched by their reason; branches of guidance, and models, that differ are drawn apart.
        Raises ``ValueError`` when the run has no calls yet.
        """
        if not self.calls:
            raise ValueError("there is nothing to draw yet: run the pipeline first")
        return picture(self.calls)

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
        lines += _told("step", by_step(self.calls))
        if len(layers := by_layer(self.calls)) > 1:
            lines += _told("layer", layers)
        lines.append(("planning", f"{self.plan_seconds:.3f} s"))
        if self.attention_seconds is not None:
            lines.append(("attention", f"{self.attention_seconds:.3f} s"))
        if self.forward_seconds is not None:
            lines.append(("forwards", f"{self.forward_seconds:.3f} s"))
        if self.choice is not None:
            lines.append(("kernel", self.choice.replace("\n", "\n" + " " * 18)))
        return lines


def _told(of: str, stretches: list[Stretch]) -> list[tuple[str, str]]:
    """The first and the last of many: a method that decides anew at every step would fill the screen."""
    lines = [(f"{of} {stretch.name}", stretch.words) for stretch in stretches]
    if len(lines) <= STRETCHES_TOLD:
        return lines
    left = len(lines) - STRETCHES_TOLD
    half = STRETCHES_TOLD // 2
    return [*lines[:half], (f"{of} ...", f"{left} more such lines; to_dict() has every call"), *lines[-half:]]


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _mean(densities: list[float]) -> float:
    return sum(densities) / len(densities) if densities else 1.0
