"""Settings with which every method leaves something out of short sequences."""

from __future__ import annotations

from typing import Any

from falloff.methods import Method, get

SMALL: dict[str, dict[str, Any]] = {
    "anchor": {"theta": 0.5, "block": 16, "step": 2, "initial": 9},
    "by-layer": {"method": {"name": "sparge", "q_block": 32, "kv_block": 16}},
    "hyper": {"block": 32},
    "pbs": {"tau": 0.7, "block": 32},
    "radial": {"block": 16},
    "router": {"candidates": ({"name": "radial", "block": 4}, {"name": "svg1", "density": 0.3, "block": 8})},
    "svg1": {"density": 0.3, "block": 8},
    "sta": {"window": (1, 3, 3)},
    "sta-windows": {"windows": ((1, 3, 3),)},
    "sparge": {"q_block": 32, "kv_block": 16},
    "sla": {"density": 0.2, "q_block": 32, "kv_block": 16},
    "sla2": {"density": 0.2, "q_block": 32, "kv_block": 16},
    "xattention": {"tau": 0.7, "block": 32},
}


def small(name: str) -> Method:
    return get(name, **SMALL.get(name, {}))
