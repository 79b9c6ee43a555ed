"""Faster diffusion video and image generation, with its price in quality shown.

Names are loaded when first asked for, so that ``falloff --help`` need not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falloff.api import (
        attention,
        branches,
        disable,
        enable,
        load_branches,
        plan_for,
        report,
        save_branches,
        using,
    )
    from falloff.evaluation.compare import compare
    from falloff.evaluation.tried import Goal
    from falloff.evaluation.tune import tune
    from falloff.geometry import Grid, Sequence
    from falloff.hosts.backend import register_diffusers_backend
    from falloff.hosts.sdpa import sdpa
    from falloff.methods import (
        PBS,
        SLA,
        SLA2,
        SVG1,
        SVG2,
        VSA,
        AdaSpa,
        Anchor,
        ByLayer,
        Contour,
        Full,
        Hyper,
        Method,
        Radial,
        Router,
        SlidingTile,
        SpargeAttn,
        TileWindows,
        XAttention,
    )
    from falloff.methods.presets import PRESETS, preset
    from falloff.plan import BlockMap, Plan
    from falloff.recipe import Recipe, RecipeError
    from falloff.reporting import Report
    from falloff.schedule import Schedule

__all__ = [
    "PBS",
    "PRESETS",
    "SLA",
    "SLA2",
    "SVG1",
    "SVG2",
    "VSA",
    "AdaSpa",
    "Anchor",
    "BlockMap",
    "ByLayer",
    "Contour",
    "Full",
    "Goal",
    "Grid",
    "Hyper",
    "Method",
    "Plan",
    "Radial",
    "Recipe",
    "RecipeError",
    "Report",
    "Router",
    "Schedule",
    "Sequence",
    "SlidingTile",
    "SpargeAttn",
    "TileWindows",
    "XAttention",
    "attention",
    "branches",
    "compare",
    "disable",
    "enable",
    "load_branches",
    "plan_for",
    "preset",
    "register_diffusers_backend",
    "report",
    "save_branches",
    "sdpa",
    "tune",
    "using",
]

_HOME = {
    "falloff.api": (
        "attention",
        "branches",
        "disable",
        "enable",
        "load_branches",
        "plan_for",
        "report",
        "save_branches",
        "using",
    ),
    "falloff.evaluation.compare": ("compare",),
    "falloff.evaluation.tried": ("Goal",),
    "falloff.evaluation.tune": ("tune",),
    "falloff.geometry": ("Grid", "Sequence"),
    "falloff.hosts.backend": ("register_diffusers_backend",),
    "falloff.hosts.sdpa": ("sdpa",),
    "falloff.methods": (
        "AdaSpa",
        "Anchor",
        "ByLayer",
        "Contour",
        "Full",
        "Hyper",
        "Method",
        "PBS",
        "Radial",
        "Router",
        "SLA",
        "SLA2",
        "SVG1",
        "SVG2",
        "SlidingTile",
        "SpargeAttn",
        "TileWindows",
        "VSA",
        "XAttention",
    ),
    "falloff.methods.presets": ("PRESETS", "preset"),
    "falloff.plan": ("BlockMap", "Plan"),
    "falloff.recipe": ("Recipe", "RecipeError"),
    "falloff.reporting": ("Report",),
    "falloff.schedule": ("Schedule",),
}
_MODULES = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return __all__
