"""What the CPU kernels derive from a plan, once: which tokens each call of the inner operator reads.

Tokens are gathered in *units*: whole blocks where blocks are uniform, single tokens where sizes vary or keys are
dropped. Query blocks of one head with the same key list are joined, because the operator is faster on longer query
tiles; joined rows with equally long lists form a chunk, so that nothing in a call needs padding or a mask. Where
neighbouring query blocks share most of their keys, as in static maps, the shared keys and the rest are two lists each,
merged afterwards.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from falloff.geometry import inverse
from falloff.plan import Plan, Sizes

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

JOINED_TOKENS = 1024  # the operator's efficiency no longer rises beyond this many queries
SHARING_TOKENS = 256  # neighbours that may share a list: enough for the operator's longer query tile


class Chunk(NamedTuple):
    """Rows of equal shape: units of queries [rows, n] and of keys [rows, m], of whose tokens ``keys`` count.

    A ragged last block is always last in its row, so that cutting at ``keys`` tokens drops just its padding. A
    chunk with ``merge`` adds keys to queries that chunks before it have answered.
    """

    q_units: Tensor
    k_units: Tensor
    keys: int
    merge: bool


class Order(NamedTuple):
    """Flat token indices [B * H * N]: into the plan's order, and back."""

    take: Tensor
    put: Tensor


class Launch(NamedTuple):
    """Everything derived from (plan, batch, heads)."""

    q_unit: int
    k_unit: int
    q_order: Order | None
    kv_order: Order | None
    chunks: list[Chunk]


_launches: WeakKeyDictionary[Plan, dict[tuple[int, int], Launch]] = WeakKeyDictionary()


def launch(plan: Plan, batch: int, heads: int, key_valid_BN: Tensor | None = None) -> Launch:
    """The launch of a plan, kept as long as the plan lives; one with ``key_valid`` depends on data and is not kept."""
    kept = _launches.setdefault(plan, {})
    if (batch, heads) not in kept:
        kept[batch, heads] = build(plan, batch, heads)
    if key_valid_BN is None:
        return kept[batch, heads]
    return build(plan, batch, heads, key_valid_BN)


def build(plan: Plan, batch: int, heads: int, key_valid_BN: Tensor | None = None) -> Launch:
    """Derive a launch; every key that ``key_valid`` drops is left out of the lists, so it is never read."""
    maps = (batch if key_valid_BN is not None else plan.blocks.shape[0], plan.blocks.shape[1])
    q_side = _side(plan.q_len, plan.q_sizes, maps)
    k_side = _side(plan.kv_len, plan.kv_sizes, maps, by_token=key_valid_BN is not None)
    valid = None if key_valid_BN is None else _in_plan_order(key_valid_BN, plan.kv_order, maps)
    blocks = plan.blocks.dense().expand(maps[0], -1, -1, -1).flatten(0, 1).numpy()
    chunks: list[Chunk] = []
    for number, part in enumerate(_parts(blocks, max(1, SHARING_TOKENS * blocks.shape[1] // plan.q_len))):
        lists = _lists(_rows(part, q_side, k_side, plan.q_len), q_side, k_side)
        if valid is not None:
            lists = _drop(lists, valid)
        chunks += _chunks(lists, _copies(maps, batch, heads), q_side.units, k_side.units, merge=number > 0)
    return Launch(
        q_side.unit,
        k_side.unit,
        _flat_order(plan.q_order, batch, heads, plan.q_len),
        _flat_order(plan.kv_order, batch, heads, plan.kv_len),
        chunks,
    )


def _parts(blocks: Bools, group: int) -> list[Bools]:
    """Disjoint maps that make up ``blocks`` [maps, Tq, Tk]: what every group of rows has in common, and the rest.

    One map alone unless at least half of its pairs are shared: merging two answers costs time too.
    """
    maps, rows, columns = blocks.shape
    whole = np.pad(blocks, ((0, 0), (0, -rows % group), (0, 0)), constant_values=True)
    shared = whole.reshape(maps, -1, group, columns).all(2).repeat(group, 1)[:, :rows]
    common = int(shared.sum())
    if common == (total := int(blocks.sum())) or 2 * common < total:
        return [blocks]
    return [shared, blocks & ~shared]


class _Side(NamedTuple):
    """The blocks of queries or keys: first unit, units and tokens of each [maps, T]; units a head."""

    unit: int
    units: int
    first: Ints
    length: Ints
    tokens: Ints


class _Rows(NamedTuple):
    """Query blocks that see something, so sorted that those joined into one piece are neighbours.

    ``pieces``: the position in ``q_block`` where each piece starts. ``k_count`` and ``k_block``: its key list.
    """

    map_id: Ints
    q_block: Ints
    pieces: Ints
    k_count: Ints
    k_block: Ints


class _Lists(NamedTuple):
    """Units of every piece, end to end: query counts and units, key counts and units, and key tokens."""

    map_id: Ints
    q_count: Ints
    q_units: Ints
    k_count: Ints
    k_units: Ints
    keys: Ints


def _side(length: int, sizes: Sizes, maps: tuple[int, int], by_token: bool = False) -> _Side:
    if isinstance(sizes, int):
        starts = np.arange(0, length, sizes)
        tokens = np.minimum(length - starts, sizes)[None].repeat(maps[0] * maps[1], 0)
    else:
        lead = sizes if sizes.ndim == 3 else sizes.view(1, 1, -1)
        tokens = lead.expand(*maps, -1).reshape(maps[0] * maps[1], -1).numpy()
    if isinstance(sizes, int) and not by_token:
        unit = min(sizes, length)
        first = np.arange(tokens.shape[1])[None].repeat(len(tokens), 0)
        return _Side(unit, tokens.shape[1], first, np.ones_like(tokens), tokens)
    return _Side(1, length, tokens.cumsum(1) - tokens, tokens, tokens)


def _rows(blocks: Bools, q_side: _Side, k_side: _Side, q_len: int) -> _Rows:
    """Sort a map's rows so that those of one head with equal key lists are neighbours, and cut them into pieces."""
    seen = np.matmul(blocks.astype(np.float64), k_side.tokens[:, :, None].astype(np.float64))[:, :, 0]
    map_id, q_block = np.nonzero((seen > 0) & (q_side.tokens > 0))
    listed = blocks[map_id, q_block]
    packed = np.packbits(listed, axis=1)
    keys = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    same_list = np.unique(keys, return_inverse=True)[1].reshape(-1)
    group = map_id * (len(same_list) + 1) + same_list
    by_group = np.argsort(group, kind="stable")
    joined = max(1, JOINED_TOKENS * blocks.shape[1] // q_len)
    pieces = _cut(group[by_group], joined)
    piece_of, k_block = np.nonzero(listed[by_group[pieces]])
    k_count = np.bincount(piece_of, minlength=len(pieces))
    return _Rows(map_id[by_group], q_block[by_group], pieces, k_count, k_block)


def _cut(group: Ints, longest: int) -> Ints:
    """Where runs of equal values start, runs longer than ``longest`` being cut."""
    position = np.arange(len(group))
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    rank = position - np.repeat(starts, np.diff(starts, append=len(group)))
    return np.flatnonzero(rank % longest == 0)


def _lists(rows: _Rows, q_side: _Side, k_side: _Side) -> _Lists:
    map_id = rows.map_id[rows.pieces]
    q_count = q_side.length[rows.map_id, rows.q_block]
    q_units = _ranges(q_side.first[rows.map_id, rows.q_block], q_count)
    k_map = np.repeat(map_id, rows.k_count)
    k_count = k_side.length[k_map, rows.k_block]
    k_units = _ranges(k_side.first[k_map, rows.k_block], k_count)
    k_starts = rows.k_count.cumsum() - rows.k_count
    return _Lists(
        map_id,
        _sums(q_count, rows.pieces),
        q_units,
        _sums(k_count, k_starts),
        k_units,
        _sums(k_side.tokens[k_map, rows.k_block], k_starts),
    )


def _drop(lists: _Lists, valid: Bools) -> _Lists:
    """Leave the keys that are not valid [maps, Nkv] out of the lists, whose units are tokens."""
    kept = valid[np.repeat(lists.map_id, lists.k_count), lists.k_units]
    k_count = _sums(kept.astype(np.int64), lists.k_count.cumsum() - lists.k_count)
    live = k_count > 0
    return _Lists(
        lists.map_id[live],
        lists.q_count[live],
        lists.q_units[np.repeat(live, lists.q_count)],
        k_count[live],
        lists.k_units[kept],
        k_count[live],
    )


def _chunks(lists: _Lists, copies: Ints, q_per_head: int, k_per_head: int, *, merge: bool) -> list[Chunk]:
    """Pieces of equal shape together, once for every (batch entry, head) that shares their map."""
    shape = np.stack([lists.keys, lists.k_count, lists.q_count])
    by_shape = np.lexsort(shape)
    changes = np.any(np.diff(shape[:, by_shape], axis=1) != 0, axis=0)
    q_start, k_start = (count.cumsum() - count for count in (lists.q_count, lists.k_count))
    chunks = []
    for pieces in np.split(by_shape, np.flatnonzero(changes) + 1):
        if not len(pieces):
            continue
        first = pieces[0]
        head = copies[lists.map_id[pieces]][:, :, None]
        q = lists.q_units[q_start[pieces, None] + np.arange(lists.q_count[first])][:, None] + head * q_per_head
        k = lists.k_units[k_start[pieces, None] + np.arange(lists.k_count[first])][:, None] + head * k_per_head
        rows = head.shape[0] * head.shape[1]
        q_units, k_units = (torch.from_numpy(x.reshape(rows, -1)) for x in (q, k))
        chunks.append(Chunk(q_units, k_units, int(lists.keys[first]), merge))
    return chunks


def _copies(maps: tuple[int, int], batch: int, heads: int) -> Ints:
    """Flat (batch entry, head) numbers that share each map, [maps, copies]."""
    flat = np.arange(batch * heads).reshape(maps[0], batch // maps[0], maps[1], heads // maps[1])
    copies: Ints = flat.transpose(0, 2, 1, 3).reshape(maps[0] * maps[1], -1)
    return copies


def _in_plan_order(key_valid_BN: Tensor, order: Tensor | None, maps: tuple[int, int]) -> Bools:
    """Which keys are valid, in the plan's order, [maps, Nkv]."""
    valid = key_valid_BN[:, None].expand(*maps, -1)
    if order is not None:
        valid = valid.gather(2, order.expand_as(valid))
    return np.asarray(valid.flatten(0, 1))


def _flat_order(order: Tensor | None, batch: int, heads: int, length: int) -> Order | None:
    if order is None:
        return None
    offset = torch.arange(batch * heads).view(batch, heads, 1) * length
    take, put = ((x.expand(batch, heads, -1) + offset).flatten() for x in (order, inverse(order)))
    return Order(take, put)


def _ranges(first: Ints, count: Ints) -> Ints:
    """``first[i], first[i] + 1, ...`` for ``count[i]`` numbers, end to end."""
    ends = count.cumsum()
    offset: Ints = np.repeat(first - (ends - count), count)
    numbers: Ints = offset + np.arange(len(offset), dtype=np.int64)
    return numbers


def _sums(values: Ints, starts: Ints) -> Ints:
    """Sums over the stretches that begin at ``starts``; none of them may be empty."""
    sums: Ints = np.add.reduceat(values, starts) if len(starts) else np.zeros(0, dtype=np.int64)
    return sums
