"""The pictures: one handwritten digit each, white on black, 64 x 64 px, shifted by whole tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from falloff.miniature import digits
from falloff.miniature.digits import GLYPH, Choice

SIDE = 64  # px
TOKEN = 4  # px: the side of a token
SHIFTS = (-TOKEN, 0, TOKEN)


def picture(scan: int, down: int = 0, right: int = 0) -> Tensor:
    """A scan in the middle, shifted by px: [1, SIDE, SIDE] in [-1, 1]."""
    canvas = np.zeros((SIDE, SIDE), dtype=np.float32)
    top, left = ((SIDE - GLYPH) // 2 + shift for shift in (down, right))
    canvas[top : top + GLYPH, left : left + GLYPH] = digits.scans()[0][scan]
    return torch.from_numpy(canvas)[None] * 2 - 1


def draw(rng: np.random.Generator, count: int) -> Tensor:
    """Random training scans at random places, [count, 1, SIDE, SIDE]."""
    scans, _ = labelled(digits.training_scans)
    chosen = rng.choice(scans, size=count)
    return torch.stack([picture(int(i), *(int(s) for s in rng.choice(SHIFTS, size=2))) for i in chosen])


def labelled(choose: Choice) -> tuple[list[int], list[int]]:
    """Scans of one side of the split, and their digits."""
    pairs = [(scan, digit) for digit in range(10) for scan in choose(digit)]
    return [scan for scan, _ in pairs], [digit for _, digit in pairs]


def centred(choose: Choice) -> tuple[Tensor, Tensor]:
    """All pictures of one side of the split, [count, 1, SIDE, SIDE], and their digits."""
    scans, labels = labelled(choose)
    return torch.stack([picture(scan) for scan in scans]), torch.tensor(labels)
