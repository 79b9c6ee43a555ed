"""Methods: settings that make plans, one file each."""

from __future__ import annotations

import dataclasses
from typing import Any

from falloff.methods.adaspa import AdaSpa
from falloff.methods.anchor import Anchor
from falloff.methods.base import Call, Dense, Method, State
from falloff.methods.by_layer import ByLayer
from falloff.methods.contour import Contour
from falloff.methods.full import Full
from falloff.methods.hyper import Hyper
from falloff.methods.pbs import PBS
from falloff.methods.radial import Radial
from falloff.methods.router import Router
from falloff.methods.sla import SLA
from falloff.methods.sla2 import SLA2
from falloff.methods.sparge import SpargeAttn
from falloff.methods.sta import SlidingTile
from falloff.methods.sta_windows import TileWindows
from falloff.methods.svg1 import SVG1
from falloff.methods.svg2 import SVG2
from falloff.methods.vsa import VSA
from falloff.methods.xattention import XAttention

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        Full,
        Radial,
        Contour,
        SVG1,
        SVG2,
        AdaSpa,
        Router,
        SlidingTile,
        TileWindows,
        ByLayer,
        XAttention,
        SpargeAttn,
        VSA,
        SLA,
        SLA2,
        Anchor,
        Hyper,
        PBS,
    )
}
"""Every method by the name that the command line and recipes use."""


def get(name: str, **settings: Any) -> Method:
    """The named method with these settings; the rest keep their defaults.

    Raises ``ValueError`` for an unknown name or setting, and what the method raises for an illegal value.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}")
    method = METHODS[name]
    known = [field.name for field in dataclasses.fields(method)]
    for setting in settings:
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting!r}; it has {', '.join(known) or 'none'}")
    return method(**settings)


__all__ = [
    "METHODS",
    "PBS",
    "SLA",
    "SLA2",
    "SVG1",
    "SVG2",
    "VSA",
    "AdaSpa",
    "Anchor",
    "ByLayer",
    "Call",
    "Contour",
    "Dense",
    "Full",
    "Hyper",
    "Method",
    "Radial",
    "Router",
    "SlidingTile",
    "SpargeAttn",
    "State",
    "TileWindows",
    "XAttention",
    "get",
]
