"""What the Triton kernels share: where a program stands, what its list names, and how rows of tokens are read.

A program computes one *task*: up to a tile of tokens of one block of its own side, against the other side's tokens
that the block's list names, tile by tile. Offsets into tensors are int64 throughout: 40 heads of 128 channels pass
2^31 elements at 420 thousand tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(tasks, heads, map_heads):
    """This program's map, row, first position and count of tokens; its batch entry and head (int64).

    Axis 1 of the grid runs over the batch entries and heads that share the maps.
    """
    task = tasks + 4 * tl.program_id(0)
    map_id = tl.load(task)
    sharing = heads // map_heads
    copy = tl.program_id(1)
    b = (map_id // map_heads + copy // sharing).to(tl.int64)
    h = (map_id % map_heads + copy % sharing).to(tl.int64)
    return map_id, tl.load(task + 1), tl.load(task + 2), tl.load(task + 3), b, h


@triton.jit
def own_tokens(order, map_id, order_stride, first, count, TILE: tl.constexpr, ORDERED: tl.constexpr):
    """Tokens [TILE] of a task (int64), and which of them there are."""
    lane = tl.arange(0, TILE)
    ok = lane < count
    tokens = (first + lane).to(tl.int64)
    if ORDERED:
        tokens = tl.load(order + map_id.to(tl.int64) * order_stride + tokens, mask=ok, other=0).to(tl.int64)
    return tokens, ok


@triton.jit
def row_list(start, entries, row, TILE: tl.constexpr, UNIT: tl.constexpr):
    """A row's list of units of the other side: its entries, and how many tiles they make."""
    begin = tl.load(start + row)
    count = (tl.load(start + row + 1) - begin).to(tl.int32)
    return entries + begin, count * UNIT // TILE


@triton.jit
def ragged_tiles(entries, tiles, length, TILE: tl.constexpr, UNIT: tl.constexpr):
    """How many tiles at the list's end belong to a block that is shorter than the others."""
    last = tl.load(entries + (tiles * TILE // UNIT - 1), mask=tiles > 0, other=0)
    return tl.where((tiles > 0) & ((last + 1) * UNIT > length), UNIT // TILE, 0)


@triton.jit
def listed_tokens(
    entries, tile, length, order, TILE: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr, ORDERED: tl.constexpr
):
    """Tokens [TILE] (int64) of a list's tile, and which of them there are."""
    lane = tl.arange(0, TILE)
    if PACKED:
        entry = tl.load(entries + tile * (TILE // UNIT) + lane // UNIT)
        inside = lane % UNIT
        ok = inside < entry % 32
        tokens = (entry // 32 + inside).to(tl.int64)
    else:
        column = tl.load(entries + tile // (UNIT // TILE)).to(tl.int64)
        tokens = column * UNIT + tile % (UNIT // TILE) * TILE + lane
        ok = tokens < length
    if ORDERED:
        tokens = tl.load(order + tokens, mask=ok, other=0).to(tl.int64)
    return tokens, ok


@triton.jit
def load_rows(base, tokens, stride, ok, D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Rows of tokens [TILE, WIDTH]: zero beyond D channels and, if ``MASKED``, where there is no token."""
    channel = tl.arange(0, WIDTH)
    pointers = base + (tokens[:, None] * stride + channel[None, :])
    if MASKED and D != WIDTH:
        rows = tl.load(pointers, mask=ok[:, None] & (channel < D)[None, :], other=0.0)
    elif MASKED:
        rows = tl.load(pointers, mask=ok[:, None], other=0.0)
    elif D != WIDTH:
        rows = tl.load(pointers, mask=(channel < D)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def store_rows(base, tokens, stride, ok, rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Write the rows of the tokens that there are, in the tensor's own precision."""
    channel = tl.arange(0, WIDTH)
    pointers = base + (tokens[:, None] * stride + channel[None, :])
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=ok[:, None] & (channel < D)[None, :])
