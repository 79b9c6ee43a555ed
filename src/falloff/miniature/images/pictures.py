"""The pictures: one handwritten digit each, white on black, 64 x 64 px."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from falloff.miniature import digits
from falloff.miniature.digits import GLYPH, Choice

SIDE = 64  # px
TOKEN = 4  # px: the side of a token


def pictures(choose: Choice) -> tuple[Tensor, Tensor]:
    """All scans of one side of the split, [count, 1, SIDE, SIDE] in [-1, 1], and their digits, [count].

    ``choose`` is one of ``training_scans`` and ``held_out_scans`` of ``falloff.miniature.digits``.
    """
    pairs = [(scan, digit) for digit in range(10) for scan in choose(digit)]
    glyphs = digits.scans()[0][[scan for scan, _ in pairs]]
    edge = (SIDE - GLYPH) // 2
    canvas = np.pad(glyphs, ((0, 0), (edge, edge), (edge, edge)))
    return torch.from_numpy(canvas)[:, None] * 2 - 1, torch.tensor([digit for _, digit in pairs])
