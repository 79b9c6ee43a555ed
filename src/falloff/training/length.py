"""Positions of videos longer than a model was trained on.

Plain rotary embedding goes on counting. RIFLEx (arXiv:2502.15894) finds the one component of the temporal frequencies
whose period is nearest to the trained length, which makes a longer video repeat itself, and lowers it until a single
period covers the new length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from falloff.training.errors import TrainingError

THETA = 10000.0
TURN = 0.9
"""Share of a period that the new length fills: less than all of it, so that the last frame is unlike the first."""


def intrinsic(channels: int, trained: int) -> tuple[int, float]:
    """The component of ``channels`` temporal channels with the period nearest to ``trained`` frames, and its frequency
    in radians a frame."""
    frequencies = [THETA ** (-2 * j / channels) for j in range(channels // 2)]
    j = min(range(len(frequencies)), key=lambda j: abs(2 * math.pi / frequencies[j] - trained))
    return j, frequencies[j]


@contextmanager
def riflex(model: nn.Module, trained: int, frames: int) -> Iterator[None]:
    """Lower the intrinsic component for ``frames`` frames of the model's grid, ``trained`` of which it knows.

    Tables of this model alone are replaced, and put back afterwards. Raises ``TrainingError`` for a model without
    tables of rotary embedding.
    """
    rope: Any = getattr(model, "rope", None)
    if not all(hasattr(rope, name) for name in ("freqs_cos", "freqs_sin", "t_dim")):
        raise TrainingError(
            f"{type(model).__name__} keeps no table of rotary positions that RIFLEx could change; use rope='plain'"
        )
    before = rope.freqs_cos, rope.freqs_sin
    component, frequency = intrinsic(rope.t_dim, trained)
    lowered = min(frequency, TURN * 2 * math.pi / frames)
    rope.freqs_cos, rope.freqs_sin = (
        _column(table, component, wave, lowered) for table, wave in zip(before, (torch.cos, torch.sin), strict=True)
    )
    try:
        yield
    finally:
        rope.freqs_cos, rope.freqs_sin = before


def _column(table: Tensor, component: int, wave: Any, frequency: float) -> Tensor:
    """The table [positions, channels] with another frequency in the two channels of a component."""
    angles = torch.arange(len(table), dtype=torch.float64, device=table.device) * frequency
    changed = table.clone()
    changed[:, 2 * component : 2 * component + 2] = wave(angles).to(table.dtype)[:, None]
    return changed
