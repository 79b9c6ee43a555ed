"""Faster diffusion video and image generation, with its price in quality shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from falloff.api import attention, disable, enable, plan_for, report, using
from falloff.geometry import Grid, Sequence
from falloff.methods import Full, Method, Radial
from falloff.methods.presets import PRESETS, preset
from falloff.plan import BlockMap, Plan
from falloff.schedule import Schedule
from falloff.session import Report

if TYPE_CHECKING:
    from falloff.evaluation.compare import compare

__all__ = [
    "PRESETS",
    "BlockMap",
    "Full",
    "Grid",
    "Method",
    "Plan",
    "Radial",
    "Report",
    "Schedule",
    "Sequence",
    "attention",
    "compare",
    "disable",
    "enable",
    "plan_for",
    "preset",
    "report",
    "using",
]


def __getattr__(name: str) -> Any:
    """``compare`` is loaded when asked for: it needs PyAV, which attention does not."""
    if name != "compare":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from falloff.evaluation.compare import compare

    return compare
