"""How many token pairs of a frame pair fall into each pair of blocks: exact counts without token masks.

Used by static methods whose window depends on the frame distance alone. Inside a frame tokens are numbered in
raster order, k = y * width + x. Blocks cut the whole sequence, so a frame may start inside a block (at its *phase*).
A frame's *edges* are the places, counted from its first token, where blocks meet: 0 = e[0] < ... < e[m] = s.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def band_counts(width: int, rows: Ints, columns: Ints) -> Ints:
    """Pairs with |k - l| <= width in every cell of rows x columns (edges of two frames), in closed form.

    With T(y) = y (y - 1) / 2 for y > 0, pairs k < r, l < x with l - k > w number T(x - w) - T(x - w - r), and
    likewise with the roles exchanged; the rest lie in the band. Differences along both edges give the cells.
    """
    r, x = rows[:, None], columns[None, :]
    above = _triangle(x - width) - _triangle(x - width - r)
    below = _triangle(r - width) - _triangle(r - width - x)
    cells: Ints = np.diff(np.diff(r * x - above - below, axis=0), axis=1)
    return cells


def window_seen(runs: list[tuple[int, int]], rows: Ints, order_S: Ints | None, shape: tuple[int, int]) -> Ints:
    """How many queries of each block have each key of a frame in their window, [blocks, s], keys in order.

    ``runs``: the window around a token as horizontal runs (dy, half): it sees (y + dy, x - half .. x + half),
    clipped to the frame of ``shape`` (height, width). ``rows``: edges of the blocks of queries, taken along
    ``order_S`` (``None`` = raster). Prefix sums along x count a run with two look-ups.
    """
    height, width = shape
    token_order = np.arange(height * width) if order_S is None else order_S
    blocks = rows.size - 1
    block_of_token = np.empty(token_order.size, dtype=np.int64)
    block_of_token[token_order] = np.repeat(np.arange(blocks), np.diff(rows))
    members = block_of_token.reshape(1, height, width) == np.arange(blocks)[:, None, None]
    prefix = np.zeros((blocks, height, width + 1), dtype=np.int64)
    np.cumsum(members, axis=2, out=prefix[:, :, 1:])
    seen = np.zeros(members.shape, dtype=np.int64)
    x = np.arange(width)
    for dy, half in runs:
        y0, y1 = max(0, -dy), min(height, height - dy)
        if y0 < y1:
            row_prefix = prefix[:, y0 + dy : y1 + dy]
            left, right = np.maximum(x - half, 0), np.minimum(x + half + 1, width)
            seen[:, y0:y1] += row_prefix[:, :, right] - row_prefix[:, :, left]
    in_order: Ints = seen.reshape(blocks, -1)[:, token_order]
    return in_order


def reference_cells(width: int, q_phase: int, kv_phase: int, *, tokens: int, block: int) -> NDArray[np.bool_]:
    """The published code's blocks of one pair of frames, bool [ceil(s / block), ceil(s / block)].

    Frames of s = ``tokens`` tokens that start at the given phases in their blocks; |k - l| <= width is allowed.
    """
    blocks = -(-tokens // block)
    row = np.arange(blocks) * block - q_phase
    first, last = np.clip(row, 0, tokens)[:, None], np.clip(row + block, 0, tokens)[:, None]
    column = np.arange(blocks * block) - kv_phase
    allowed = np.maximum(np.minimum(last, column + width + 1) - np.maximum(first, column - width), 0)
    allowed = np.where((column >= 0) & (column < tokens), allowed, 0).reshape(blocks, blocks, block)
    dense_columns = (allowed * 3 > block).sum(2)
    touched_columns = (allowed > 0).sum(2)
    on: NDArray[np.bool_] = dense_columns > 0.6 * (touched_columns + 1e-9)
    return on


def disc_runs(band: int) -> list[tuple[int, int]]:
    """The disc with the token budget of a band: dist <= sqrt((2 band + 1) / pi)."""
    squared = (2 * band + 1) / math.pi
    radius = math.isqrt(int(squared))
    return [(dy, math.isqrt(int(squared - dy * dy))) for dy in range(-radius, radius + 1)]


def _triangle(y: Ints) -> Ints:
    y = np.maximum(y, 0)
    return y * (y - 1) // 2
