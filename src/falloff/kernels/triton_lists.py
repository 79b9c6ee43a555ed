"""What the Triton kernels derive from a plan, once: tasks of one side, and lists of the other side's tokens.

A list names *units*: whole blocks where blocks are uniform and the kernel's tile divides them, in which case the
plan's own columns serve; else runs of up to 16 tokens, cut after neighbouring blocks were joined, so that a tile is
filled across the borders of blocks of any size.
"""

from __future__ import annotations

from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from falloff.plan import BlockMap, Plan

Side = Literal["q", "kv"]

RUN = 16  # tokens of a packed unit at most: fewer waste less of a tile, more make shorter lists
PACKED_TOKENS = 1 << 26  # an entry is 32 * first + count, in 31 bits


class Lists(NamedTuple):
    """``tasks`` int32 [n, 4]: map, row, first position, tokens; heavy heads first, in a head heavy rows first.

    ``entries[start[row] : start[row + 1]]`` int32: the units of a row, of ``unit`` tokens, ``packed`` or whole blocks.
    """

    tasks: Tensor
    start: Tensor
    entries: Tensor
    unit: int
    packed: bool


class Orders(NamedTuple):
    """The token at each position, int32 [maps | 1, N]; ``None`` is the given order."""

    q: Tensor | None
    kv: Tensor | None


_lists: WeakKeyDictionary[Plan, dict[tuple[Side, int, int], Lists]] = WeakKeyDictionary()
_orders: WeakKeyDictionary[Plan, Orders] = WeakKeyDictionary()


def lists(plan: Plan, side: Side, own: int, other: int) -> Lists:
    """Tasks of up to ``own`` tokens of a side, whose lists fill tiles of ``other``; kept as long as the plan lives."""
    kept = _lists.setdefault(plan, {})
    if (side, own, other) not in kept:
        kept[side, own, other] = build(plan, side, own, other)
    return kept[side, own, other]


def orders(plan: Plan) -> Orders:
    """The plan's orders as kernels read them, kept as long as the plan lives."""
    if plan not in _orders:
        _orders[plan] = Orders(_per_map(plan, plan.q_order), _per_map(plan, plan.kv_order))
    return _orders[plan]


def build(plan: Plan, side: Side, own: int, other: int) -> Lists:
    """Derive the lists of a side. Its rows are the map's (queries) or the transposed map's (keys)."""
    blocks = plan.blocks if side == "q" else plan.blocks.transposed
    own_sizes, other_sizes = (_per_block(plan, x) for x in ((side, "kv") if side == "q" else (side, "q")))
    other_size = plan.kv_sizes if side == "q" else plan.q_sizes
    if isinstance(other_size, int) and other_size % other == 0:
        start, entries, unit, packed = blocks.start, blocks.columns, other_size, False
    else:
        start, entries = _pack(blocks, other_sizes, other)
        unit, packed = RUN, True
    return Lists(_tasks(own_sizes, start.diff(), own), start, entries, unit, packed)


def _tasks(sizes_MT: Tensor, lengths: Tensor, own: int) -> Tensor:
    maps, blocks = sizes_MT.shape
    by_length = lengths.view(maps, blocks).argsort(dim=1, descending=True, stable=True)
    by_head = lengths.view(maps, blocks).sum(1).argsort(dim=0, descending=True, stable=True)
    row = (by_length + blocks * torch.arange(maps, device=lengths.device)[:, None])[by_head].flatten()
    tokens = sizes_MT.flatten()[row]
    tiles = (tokens + own - 1) // own
    task = torch.repeat_interleave(torch.arange(len(row), device=row.device), tiles)
    offset = own * _ranks(tiles, task)
    first = (sizes_MT.cumsum(1) - sizes_MT).flatten()[row][task] + offset
    count = (tokens[task] - offset).clamp(max=own)
    return torch.stack([row[task] // blocks, row[task], first, count], 1).to(torch.int32)


def _pack(blocks: BlockMap, sizes_MT: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """Every row's tokens as runs, padded to whole tiles by runs of no token: (start, entries)."""
    count = sizes_MT.shape[1]
    row = blocks.row_ids
    block = torch.div(row, blocks.shape[2], rounding_mode="floor") * count + blocks.columns
    tokens = sizes_MT.flatten()[block]
    row, block, tokens = (x[tokens > 0] for x in (row, block, tokens))
    first = (sizes_MT.cumsum(1) - sizes_MT).flatten()[block]
    opens = torch.ones_like(row, dtype=torch.bool)  # a pair opens a span unless it goes on where its row's last ended
    opens[1:] = (row[1:] != row[:-1]) | (first[1:] != first[:-1] + tokens[:-1])
    span = opens.cumsum(0) - 1
    row, first = row[opens], first[opens]
    tokens = torch.zeros_like(row).index_add_(0, span, tokens)

    runs = (tokens + RUN - 1) // RUN
    row_runs = torch.zeros(blocks.rows, dtype=torch.int64, device=row.device).index_add_(0, row, runs)
    start = torch.zeros(blocks.rows + 1, dtype=torch.int64, device=row.device)
    torch.cumsum((row_runs * RUN + tile - 1) // tile * (tile // RUN), 0, out=start[1:])
    span = torch.repeat_interleave(torch.arange(len(runs), device=row.device), runs)
    offset = RUN * _ranks(runs, span)
    within = torch.arange(len(span), device=row.device) - (row_runs.cumsum(0) - row_runs)[row[span]]
    entries = torch.zeros(int(start[-1]), dtype=torch.int32, device=row.device)
    run = 32 * (first[span] + offset) + (tokens[span] - offset).clamp(max=RUN)
    entries[start[row[span]] + within] = run.to(torch.int32)
    return start, entries


def _ranks(counts: Tensor, owner: Tensor) -> Tensor:
    """Of items laid end to end, ``counts[i]`` to each owner i, the number of each within its owner."""
    return torch.arange(len(owner), device=owner.device) - (counts.cumsum(0) - counts)[owner]


def _per_block(plan: Plan, side: str) -> Tensor:
    """Block sizes of a side in every map, int64 [maps, T]."""
    sizes = plan.q_sizes_BHT() if side == "q" else plan.kv_sizes_BHT()
    return sizes.expand(*plan.blocks.shape[:2], -1).flatten(0, 1).contiguous()


def _per_map(plan: Plan, order: Tensor | None) -> Tensor | None:
    if order is None:
        return None
    batch, heads = plan.blocks.shape[:2]
    if order.numel() > order.shape[-1]:
        order = order.expand(batch, heads, -1)
    return order.reshape(-1, order.shape[-1]).to(torch.int32)
