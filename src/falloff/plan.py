"""What a kernel must know about one attention call: orders, blocks, and which pairs of blocks are computed.

Shapes: B batch, H heads, N tokens, Tq / Tk query / key blocks. A block map with batch or head axis of size 1
is shared along it. All tensors of a plan live on one device and are never written to after construction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Sizes = int | Tensor

STRETCH = 1 << 19
"""Pairs of blocks, or places of tokens, that are looked at together: indices of all of them would be large."""


class PlanError(ValueError):
    """A plan that does not describe an attention call, or not this one."""


@dataclass(frozen=True, eq=False)
class BlockMap:
    """Which (query block, key block) pairs are computed, as CSR over rows (b, h, query block).

    ``start`` int64 [B * H * Tq + 1] and ``columns`` int32 [pairs], ascending and unique in every row.
    """

    shape: tuple[int, int, int, int]
    start: Tensor
    columns: Tensor

    def __post_init__(self) -> None:
        rows, width = self.rows, self.shape[3]
        start, columns = self.start, self.columns
        if start.dtype != torch.int64 or columns.dtype != torch.int32:
            raise PlanError(f"start must be int64 and columns int32, got {start.dtype} and {columns.dtype}")
        if start.shape != (rows + 1,) or columns.ndim != 1:
            raise PlanError(f"start must have shape ({rows + 1},), got {tuple(start.shape)}")
        if int(start[0]) != 0 or int(start[-1]) != columns.numel() or bool((start.diff() < 0).any()):
            raise PlanError(f"start must rise from 0 to the number of pairs, {columns.numel()}")
        if columns.numel():
            least, most = columns.aminmax()
            if bool((least < 0) | (most >= width)):
                raise PlanError(f"key block ids must lie in 0 to {width - 1}")
        falls = columns[1:] <= columns[:-1]
        row_ends = start[1:-1] - 1
        inside = (row_ends >= 0) & (row_ends < falls.numel())
        falls[row_ends[inside]] = False
        if bool(falls.any()):
            raise PlanError("key block ids must be ascending and unique in every row")

    @staticmethod
    def from_dense(blocks: Tensor) -> BlockMap:
        """From booleans [Tq, Tk], [H, Tq, Tk] or [B, H, Tq, Tk]."""
        if blocks.dtype != torch.bool or not 2 <= blocks.ndim <= 4:
            raise PlanError(f"a dense block map is bool [B|1, H|1, Tq, Tk], got {blocks.dtype} {tuple(blocks.shape)}")
        blocks = blocks.reshape((1,) * (4 - blocks.ndim) + tuple(blocks.shape))
        b, h, q, k = blocks.shape
        flat = blocks.flatten()
        start = torch.zeros(b * h * q + 1, dtype=torch.int64, device=blocks.device)
        columns = torch.empty(int(flat.count_nonzero()), dtype=torch.int32, device=blocks.device)
        found = 0
        for first, end in _row_stretches(b * h * q, k):
            index = _flat_nonzero(flat[first * k : end * k])
            row_ends = torch.arange(1, end - first + 1, device=blocks.device) * k
            start[first + 1 : end + 1] = torch.searchsorted(index, row_ends) + found
            columns[found : found + len(index)] = index.remainder_(k)
            found += len(index)
        return BlockMap((b, h, q, k), start, columns)

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    @property
    def pairs(self) -> int:
        return self.columns.numel()

    @property
    def row_ids(self) -> Tensor:
        """The row of every pair, int64 [pairs]."""
        return torch.repeat_interleave(torch.arange(self.rows, device=self.start.device), self.start.diff())

    def dense(self) -> Tensor:
        """As booleans [B|1, H|1, Tq, Tk]."""
        blocks = torch.zeros(self.rows, self.shape[3], dtype=torch.bool, device=self.start.device)
        for row, column in self._by_stretch():
            blocks[row, column.long()] = True
        return blocks.view(self.shape)

    def tokens(self, sizes_BHT: Tensor) -> Tensor:
        """Keys that each row sees, int64 [rows], of key blocks of these sizes, int64 [B|1, H|1, Tk]."""
        b, h, q, k = self.shape
        sizes = sizes_BHT.expand(b, h, k).reshape(-1)
        seen = torch.zeros(self.rows, dtype=torch.int64, device=self.start.device)
        for row, column in self._by_stretch():
            seen.index_add_(0, row, sizes[row.div(q, rounding_mode="floor").mul_(k).add_(column)])
        return seen

    def _by_stretch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Some rows at a time: the row of every pair, int64, and its column."""
        stretches = list(_row_stretches(self.rows, self.shape[3]))
        ends = self.start[[end for _, end in stretches]].tolist()
        for (first, end), found, until in zip(stretches, [0, *ends], ends, strict=False):
            rows = torch.arange(first, end, device=self.start.device)
            counts = self.start[first : end + 1].diff()
            yield torch.repeat_interleave(rows, counts, output_size=until - found), self.columns[found:until]

    @cached_property
    def transposed(self) -> BlockMap:
        """The map of (key block, query block) pairs, for gradients of keys and values."""
        b, h, q, k = self.shape
        row = self.row_ids
        key_row = torch.div(row, q, rounding_mode="floor") * k + self.columns
        by_key = torch.argsort(key_row, stable=True)
        start = torch.zeros(b * h * k + 1, dtype=torch.int64, device=row.device)
        torch.cumsum(torch.bincount(key_row, minlength=b * h * k), 0, out=start[1:])
        return BlockMap((b, h, k, q), start, (row % q)[by_key].to(torch.int32))

    def to(self, device: torch.device | str) -> BlockMap:
        if self.start.device == torch.device(device):
            return self
        return BlockMap(self.shape, self.start.to(device), self.columns.to(device))

    def picture(self, pixels: int = 256) -> np.ndarray:
        """Share of computed pairs, uint8 [p, p] with p <= pixels: 255 all, 0 none; batch and heads averaged."""
        b, h, q, k = self.shape
        rows, columns = min(q, pixels), min(k, pixels)
        y = (self.row_ids % q) * rows // q
        x = self.columns.long() * columns // k
        counts = torch.bincount(y * columns + x, minlength=rows * columns).view(rows, columns).cpu().double()
        area_y = torch.bincount(torch.arange(q) * rows // q, minlength=rows)
        area_x = torch.bincount(torch.arange(k) * columns // k, minlength=columns)
        share = counts / (b * h * area_y[:, None] * area_x)
        return np.asarray((share * 255).round().to(torch.uint8))


@dataclass(frozen=True, eq=False, kw_only=True)
class Plan:
    """One attention call over ``q_len`` queries and ``kv_len`` keys, computed block by block.

    ``q_order`` / ``kv_order``: int64 permutations [N], or [B|1, H|1, N] per head; ``None`` is the given order.
    ``q_sizes`` / ``kv_sizes``: an int for uniform blocks with a shorter last one, or int64 [T] or
    [B|1, H|1, T] sizes that sum to N, zero allowed. ``blocks``: the map; each of its blocks is computed whole.
    A ``partial`` plan (one branch of a merge) may have queries that see nothing: they give 0 and LSE -inf.
    With ``summary`` a block that a query does not see still answers it, as one key and value: the means over its m
    tokens, at their logit plus log(m). Those pairs do not count as computed.
    ``skip``: leave blocks out while computing, by the rule of ``falloff.kernels.skip``, whose weights would all be
    below 2^-skip of the largest so far; at least 0, ``None`` leaves out nothing. Forward only. Which blocks go is not
    known before, so that they count as computed.
    ``dropped``: of the blocks that are not computed, those that a method's own branch leaves out too; kernels never
    look at it.

    Raises ``PlanError`` when these do not fit together. Checked once here, trusted by kernels.
    """

    q_len: int
    kv_len: int
    q_sizes: Sizes
    kv_sizes: Sizes
    blocks: BlockMap
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    partial: bool = False
    summary: bool = False
    skip: float | None = None
    dropped: BlockMap | None = None

    def __post_init__(self) -> None:
        _check_skip(self.skip, self.summary)
        batch, heads, q_blocks, kv_blocks = self.blocks.shape
        for side, length, sizes, order, count in (
            ("q", self.q_len, self.q_sizes, self.q_order, q_blocks),
            ("kv", self.kv_len, self.kv_sizes, self.kv_order, kv_blocks),
        ):
            _check_sizes(side, length, sizes, count, (batch, heads))
            if order is not None:
                _check_order(side, length, order, (batch, heads))
        if not self.partial and bool((self._row_pairs[self._q_sizes_rows() > 0] == 0).any()):
            raise PlanError("a query block sees no key; give every block at least one key block, or set partial=True")
        if self.dropped is not None:
            _check_dropped(self.blocks, self.dropped)

    def q_sizes_BHT(self) -> Tensor:
        """Query block sizes, int64 [B|1, H|1, Tq]."""
        return _sizes_BHT(self.q_len, self.q_sizes, self.blocks.start.device)

    def kv_sizes_BHT(self) -> Tensor:
        """Key block sizes, int64 [B|1, H|1, Tk]."""
        return _sizes_BHT(self.kv_len, self.kv_sizes, self.blocks.start.device)

    @cached_property
    def pairs(self) -> int:
        """Computed token pairs of all the maps (batch entries and heads with a map of their own) together."""
        return int((self._row_pairs * self._q_sizes_rows()).sum())

    @cached_property
    def density(self) -> float:
        """Computed token pairs / all token pairs."""
        maps = self.blocks.shape[0] * self.blocks.shape[1]
        return self.pairs / (maps * self.q_len * self.kv_len)

    def flops(self, *, batch: int, heads: int, head_dim: int) -> int:
        """Multiply-adds of both products over the computed pairs, counted twice each (4 D a pair).

        A summary adds a pair for every query and block of the other side.
        """
        maps = self.blocks.shape[0] * self.blocks.shape[1]
        summaries = maps * self.q_len * self.blocks.shape[3] if self.summary else 0
        return 4 * head_dim * (self.pairs + summaries) * batch * heads // maps

    def mask(self) -> Tensor:
        """The computed token pairs in the given (unpermuted) order, bool [B|1, H|1, Nq, Nkv]. For small N."""
        return self.keys_seen(torch.arange(self.q_len, device=self.blocks.start.device))

    def keys_seen(self, rows: Tensor) -> Tensor:
        """The keys that the queries int64 [R] are computed with, in the given order, bool [B|1, H|1, R, Nkv]."""
        seen = self.blocks_seen(self.q_block_of()[..., rows])
        kv_block = self.kv_block_of()[..., None, :].expand(*seen.shape[:3], self.kv_len)
        return seen.gather(3, kv_block)

    def blocks_seen(self, q_block: Tensor) -> Tensor:
        """The key blocks that query blocks int64 [B|1, H|1, R] see: bool [B|1, H|1, R, Tk]."""
        return self.blocks.dense().gather(2, q_block[..., None].expand(*q_block.shape, self.blocks.shape[3]))

    def q_block_of(self) -> Tensor:
        """The block of every query in the given order, int64 [B|1, H|1, Nq]."""
        return _block_of(self.q_sizes_BHT(), self.q_order, self.q_len, self.blocks.shape[:2])

    def kv_block_of(self) -> Tensor:
        """The block of every key in the given order, int64 [B|1, H|1, Nkv]."""
        return _block_of(self.kv_sizes_BHT(), self.kv_order, self.kv_len, self.blocks.shape[:2])

    def refine(self, size: int) -> Plan:
        """The same pairs at a smaller uniform block size, which must divide both of the plan's."""
        if not isinstance(self.q_sizes, int) or not isinstance(self.kv_sizes, int):
            raise PlanError("only uniform blocks can be refined")
        if self.summary:
            raise PlanError("smaller blocks have other means; a plan with a summary cannot be refined")
        if self.skip is not None:
            raise PlanError("smaller blocks are left out more often; a plan with skip cannot be refined")
        if self.dropped is not None:
            raise PlanError("a plan with dropped blocks is one method's own and cannot be refined")
        if self.q_sizes % size or self.kv_sizes % size:
            raise PlanError(f"blocks of {self.q_sizes} x {self.kv_sizes} cannot be cut into blocks of {size}")
        fine = self.blocks.dense().repeat_interleave(self.q_sizes // size, 2)
        fine = fine.repeat_interleave(self.kv_sizes // size, 3)
        fine = fine[:, :, : -(-self.q_len // size), : -(-self.kv_len // size)]
        blocks = BlockMap.from_dense(fine)
        return dataclasses.replace(self, q_sizes=size, kv_sizes=size, blocks=blocks)

    def to(self, device: torch.device | str) -> Plan:
        """The same plan on a device; itself when it is there already."""
        blocks = self.blocks.to(device)
        if blocks is self.blocks:
            return self
        moved: dict[str, Any] = {
            name: value.to(device)
            for name in ("q_sizes", "kv_sizes", "q_order", "kv_order")
            if isinstance(value := getattr(self, name), Tensor)
        }
        if self.dropped is not None:
            moved["dropped"] = self.dropped.to(device)
        return dataclasses.replace(self, blocks=blocks, **moved)

    @cached_property
    def _row_pairs(self) -> Tensor:
        """Keys seen by each row's queries, int64 [B * H * Tq]."""
        if isinstance(self.kv_sizes, Tensor):
            return self.blocks.tokens(self.kv_sizes_BHT())
        start, columns, last = self.blocks.start, self.blocks.columns, self.blocks.shape[3] - 1
        counts = start.diff()
        if not len(columns):
            return counts
        sees_last = (columns[(start[1:] - 1).clamp(min=0)] == last) & (counts > 0)  # a row's highest column is its last
        return counts * self.kv_sizes - sees_last * ((last + 1) * self.kv_sizes - self.kv_len)

    def _q_sizes_rows(self) -> Tensor:
        batch, heads, q_blocks, _ = self.blocks.shape
        return self.q_sizes_BHT().expand(batch, heads, q_blocks).reshape(-1)


def dense_plan(q_len: int, kv_len: int, block: int = 128) -> Plan:
    """The plan that computes every pair."""
    blocks = torch.ones(-(-q_len // block), -(-kv_len // block), dtype=torch.bool)
    return Plan(q_len=q_len, kv_len=kv_len, q_sizes=block, kv_sizes=block, blocks=BlockMap.from_dense(blocks))


def _row_stretches(rows: int, width: int) -> Iterator[tuple[int, int]]:
    """First row and end of stretches of about ``STRETCH`` pairs."""
    together = max(1, STRETCH // max(1, width))
    return ((first, min(first + together, rows)) for first in range(0, rows, together))


def _flat_nonzero(blocks: Tensor) -> Tensor:
    """Flat indices of the true entries, int64; numpy's search is several times faster than torch's on the CPU."""
    if blocks.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(blocks.numpy()))
    return blocks.flatten().nonzero()[:, 0]


def _sizes_BHT(length: int, sizes: Sizes, device: torch.device) -> Tensor:
    if isinstance(sizes, Tensor):
        return sizes.reshape((1,) * (3 - sizes.ndim) + tuple(sizes.shape))
    starts = torch.arange(0, length, sizes, device=device)
    return (length - starts).clamp(max=sizes).view(1, 1, -1)


def _block_of(sizes_BHT: Tensor, order: Tensor | None, length: int, lead: tuple[int, int]) -> Tensor:
    """The block of every token in the given order, int64 [B, H, N]."""
    ends = sizes_BHT.cumsum(-1).expand(*lead, -1).contiguous()
    positions = torch.arange(length, device=ends.device).expand(*lead, -1).contiguous()
    block = torch.searchsorted(ends, positions, right=True)
    if order is None:
        return block
    return torch.empty_like(block).scatter_(-1, order.expand_as(block), block)


def _check_skip(skip: float | None, summary: bool) -> None:
    if skip is None:
        return
    if not skip >= 0:
        raise PlanError(f"skip must be at least 0 bits, or None to leave nothing out, got {skip}")
    if summary:
        raise PlanError("blocks left out on the way have no summary; set either skip or summary")


def _check_sizes(side: str, length: int, sizes: Sizes, count: int, lead: tuple[int, int]) -> None:
    if length < 1:
        raise PlanError(f"{side}_len must be at least 1, got {length}")
    if isinstance(sizes, int):
        if sizes < 1:
            raise PlanError(f"{side}_sizes must be at least 1, got {sizes}")
        if -(-length // sizes) != count:
            raise PlanError(
                f"{length} tokens in blocks of {sizes} are {-(-length // sizes)} blocks, the map has {count}"
            )
        return
    if sizes.dtype != torch.int64 or not _leads(sizes, count, lead):
        raise PlanError(
            f"{side}_sizes must be int64 [{count}] or [{lead[0]}|1, {lead[1]}|1, {count}], "
            f"got {sizes.dtype} {tuple(sizes.shape)}"
        )
    if bool((sizes < 0).any()) or bool((sizes.sum(-1) != length).any()):
        raise PlanError(f"{side}_sizes must be at least 0 and sum to {length} tokens")


def _check_order(side: str, length: int, order: Tensor, lead: tuple[int, int]) -> None:
    if order.dtype != torch.int64 or not _leads(order, length, lead):
        raise PlanError(f"{side}_order must be int64 [{length}] or [B|1, H|1, {length}], got {tuple(order.shape)}")
    if not _all_of(order, length):
        raise PlanError(f"{side}_order is not a permutation of 0 to {length - 1}")


def _all_of(order: Tensor, length: int) -> bool:
    """Whether every row holds each of 0 to ``length - 1``: marked rather than sorted, which takes memory and time."""
    holds = []
    for rows in order.reshape(-1, length).split(max(1, STRETCH // length)):  # type: ignore[no-untyped-call]  # torch's own
        least, most = rows.aminmax()
        marks = torch.zeros_like(rows, dtype=torch.bool).scatter_(-1, rows.clamp(0, length - 1), True)
        holds.append((least >= 0) & (most < length) & marks.all())
    return bool(torch.stack(holds).all())  # the device is waited for once


def _check_dropped(blocks: BlockMap, dropped: BlockMap) -> None:
    if dropped.shape != blocks.shape:
        raise PlanError(f"dropped must have the shape of blocks, {blocks.shape}, got {dropped.shape}")
    kept, left = (m.row_ids * m.shape[3] + m.columns for m in (blocks, dropped))
    if bool(torch.isin(left, kept, assume_unique=True).any()):
        raise PlanError("a dropped block is computed as well; give every pair of blocks one of the two at most")


def _leads(value: Tensor, last: int, lead: tuple[int, int]) -> bool:
    if value.shape[-1:] != (last,) or value.ndim not in (1, 3):
        return False
    return value.ndim == 1 or all(n in (1, m) for n, m in zip(value.shape[:2], lead, strict=True))
