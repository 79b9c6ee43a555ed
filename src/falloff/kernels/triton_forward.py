"""Forward: online softmax over the tiles of keys that a query block's list names (Dao et al., arXiv:2205.14135)."""

from __future__ import annotations

import triton
import triton.language as tl

from falloff.kernels.triton_common import (
    listed_tokens,
    load_rows,
    own_tokens,
    place,
    ragged_tiles,
    row_list,
    store_rows,
)


@triton.jit(do_not_specialize=["heads", "map_heads", "q_len", "kv_len", "q_order_stride", "kv_order_stride"])
def forward_kernel(
    q, k, v, out, lse, tasks, start, entries, q_order, kv_order, key_valid,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b, out_h, out_n,
    heads, map_heads, q_len, kv_len, q_order_stride, kv_order_stride, scale, skip,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, Q_ORDERED: tl.constexpr, KV_ORDERED: tl.constexpr, VALID: tl.constexpr,
    PROTECTED: tl.constexpr,
):  # fmt: skip
    """One task of queries: out and natural-log LSE. ``scale`` must be positive.

    Unless ``PROTECTED`` is ``None``, a tile is a block, a task holds a whole one, and those that come too late by
    ``skip`` bits are left out but for the last ``PROTECTED`` (see skip.py).
    """
    map_id, row, first, count, b, h = place(tasks, heads, map_heads)
    tokens, ok = own_tokens(q_order, map_id, q_order_stride, first, count, OWN, Q_ORDERED)
    q_rows = load_rows(q + b * q_b + h * q_h, tokens, q_n, ok, D, WIDTH, True)
    scale = scale * 1.4426950408889634  # weights are powers of two
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    key_valid += b * kv_len
    kv_order += map_id.to(tl.int64) * kv_order_stride
    entries, tiles = row_list(start, entries, row, OTHER, UNIT)

    total = tl.zeros([OWN], tl.float32)
    high = total - float("inf")
    acc = tl.zeros([OWN, WIDTH], tl.float32)
    ragged = 0
    if not (PACKED or VALID):
        ragged = ragged_tiles(entries, tiles, kv_len, OTHER, UNIT)
    for tile in tl.range(0, tiles - ragged):
        acc, high, total = _visit(
            acc, high, total, q_rows, ok, k, v, k_n, v_n, key_valid, entries, tile, tiles, kv_len, kv_order, scale,
            skip, D, WIDTH, OTHER, UNIT, PACKED, KV_ORDERED, VALID, PACKED or VALID, PROTECTED,
        )  # fmt: skip
    if not (PACKED or VALID):
        for tile in tl.range(tiles - ragged, tiles, num_stages=1):
            acc, high, total = _visit(
                acc, high, total, q_rows, ok, k, v, k_n, v_n, key_valid, entries, tile, tiles, kv_len, kv_order, scale,
                skip, D, WIDTH, OTHER, UNIT, PACKED, KV_ORDERED, VALID, True, PROTECTED,
            )  # fmt: skip

    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)
    store_rows(out + b * out_b + h * out_h, tokens, out_n, ok, acc / divisor[:, None], D, WIDTH)
    natural = (high + tl.log2(divisor)) * 0.6931471805599453
    tl.store(lse + (b * heads + h) * q_len + tokens, tl.where(empty, -float("inf"), natural), mask=ok)


@triton.jit
def _visit(
    acc, high, total, q_rows, q_ok, k, v, k_n, v_n, key_valid, entries, tile, tiles, kv_len, kv_order, scale, skip,
    D: tl.constexpr, WIDTH: tl.constexpr, OTHER: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    ORDERED: tl.constexpr, VALID: tl.constexpr, MASKED: tl.constexpr, PROTECTED: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the running sum of weighted values, largest score and sum of weights."""
    tokens, ok = listed_tokens(entries, tile, kv_len, kv_order, OTHER, UNIT, PACKED, ORDERED)
    if VALID:
        ok = ok & (tl.load(key_valid + tokens, mask=ok, other=0) != 0)
    k_rows = load_rows(k, tokens, k_n, ok, D, WIDTH, MASKED)
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
    if MASKED:
        scores = tl.where(ok[None, :], scores, -float("inf"))
    own_high = tl.max(scores, 1) * scale
    if PROTECTED is None:
        acc, high, total = _take(
            acc, high, total, scores, own_high, v, v_n, tokens, ok, scale, D, WIDTH, MASKED
        )  # fmt: skip
    else:
        there = q_ok & (own_high != -float("inf"))
        rise = tl.max(tl.where(there, own_high - tl.where(there, high, 0.0), -float("inf")), 0)
        if (rise + skip > 0) | (tile >= tiles - PROTECTED):
            acc, high, total = _take(
                acc, high, total, scores, own_high, v, v_n, tokens, ok, scale, D, WIDTH, MASKED
            )  # fmt: skip
    return acc, high, total


@triton.jit
def _take(
    acc, high, total, scores, own_high, v, v_n, tokens, ok, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tile's weights and values join the sums. ``own_high``: its largest scores, scaled."""
    higher = tl.maximum(high, own_high)
    shift = higher
    if MASKED:  # a query may have met no key yet
        shift = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores * scale - shift[:, None])
    fade = tl.exp2(high - shift)
    v_rows = load_rows(v, tokens, v_n, ok, D, WIDTH, MASKED)
    acc = tl.dot(weights.to(v_rows.dtype), v_rows, acc * fade[:, None], input_precision="ieee")
    return acc, higher, total * fade + tl.sum(weights, 1)
