"""A training's state on disk, so that an interrupted training goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

T = TypeVar("T")


class Part(Protocol):
    """Anything with a state: a model, its average, an optimizer."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


def seeded(make: Callable[[], T]) -> T:
    """What `make` makes, with the same random weights every time; the global generator is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make()


def save_state(file: Path, parts: dict[str, Any], spent: float, step: int) -> None:
    """Write the parts, the seconds spent and the step; beside first, then renamed."""
    beside = file.with_suffix(".part")
    torch.save({"parts": {k: p.state_dict() for k, p in parts.items()}, "spent": spent, "step": step}, beside)
    os.replace(beside, file)


def load_state(file: Path, parts: dict[str, Any]) -> tuple[float, int]:
    """Fill the parts from `file` if it is there; returns the seconds spent and the step."""
    if not file.exists():
        return 0.0, 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return state["spent"], state["step"]
