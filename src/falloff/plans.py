"""The plans of a static method: made once for every size, and kept for all layers, steps and branches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from falloff.geometry import Sequence
from falloff.methods.base import Dense
from falloff.plan import Plan

PLANS_KEPT = 8
"""Plans kept at once: one for every size in use."""


@dataclass(eq=False)
class Kept:
    """A plan, and the types of tensors that it has been tried with."""

    plan: Plan | Dense
    tried: set[torch.dtype] = field(default_factory=set)


class PlanCache:
    """Plans by sequence and device; the oldest goes when there are too many."""

    def __init__(self) -> None:
        self._kept: dict[tuple[Sequence, torch.device], Kept] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        self._kept.clear()

    def get(self, sequence: Sequence, device: torch.device, make: Callable[[], Plan | Dense]) -> Kept:
        """The plan of a sequence on a device, made where there is none yet."""
        key = (sequence, device)
        kept = self._kept.get(key)
        if kept is None:
            made = Kept(make())
            if len(self._kept) >= PLANS_KEPT:
                self._kept.pop(next(iter(self._kept)))
            kept = self._kept[key] = made
        return kept
