"""Backward: weights rebuilt from the LSE, queries' gradients by rows, keys' and values' by transposed lists.

With ``P = exp(S - lse)``, ``dP = dO V^T`` and ``delta = rowsum(dO O) - dLSE``: ``dS = P (dP - delta)``,
``dQ = scale dS K``, ``dK = scale dS^T Q``, ``dV = P^T dO`` (Dao et al., arXiv:2205.14135). Every gradient is written
once, by one program: no atomics, the same bits every time.
"""

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


@triton.jit(do_not_specialize=["q_len"])
def delta_kernel(
    out, d_out, d_lse, delta, out_b, out_h, out_n, d_out_b, d_out_h, d_out_n, heads, q_len,
    D: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    """``delta`` of a tile of queries, in the given order; ``d_lse`` only if ``LSE``."""
    tokens = tl.program_id(0) * TILE + tl.arange(0, TILE).to(tl.int64)
    ok = tokens < q_len
    head = tl.program_id(1).to(tl.int64)
    b, h = head // heads, head % heads
    out_rows = load_rows(out + b * out_b + h * out_h, tokens, out_n, ok, D, WIDTH, True).to(tl.float32)
    d_out_rows = load_rows(d_out + b * d_out_b + h * d_out_h, tokens, d_out_n, ok, D, WIDTH, True).to(tl.float32)
    sums = tl.sum(out_rows * d_out_rows, 1)
    if LSE:
        sums -= tl.load(d_lse + head * q_len + tokens, mask=ok, other=0.0)
    tl.store(delta + head * q_len + tokens, sums, mask=ok)


@triton.jit(do_not_specialize=["heads", "map_heads", "q_len", "kv_len", "q_order_stride", "kv_order_stride"])
def dq_kernel(
    q, k, v, d_out, lse, delta, dq, tasks, start, entries, q_order, kv_order, key_valid,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, d_out_b, d_out_h, d_out_n, dq_b, dq_h, dq_n,
    heads, map_heads, q_len, kv_len, q_order_stride, kv_order_stride, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, Q_ORDERED: tl.constexpr, KV_ORDERED: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """One task of queries: their gradient over the keys that their list names."""
    map_id, row, first, count, b, h = place(tasks, heads, map_heads)
    tokens, ok = own_tokens(q_order, map_id, q_order_stride, first, count, OWN, Q_ORDERED)
    q_rows = load_rows(q + b * q_b + h * q_h, tokens, q_n, ok, D, WIDTH, True)
    d_out_rows = load_rows(d_out + b * d_out_b + h * d_out_h, tokens, d_out_n, ok, D, WIDTH, True)
    lse_rows = _binary_lse(lse + (b * heads + h) * q_len, tokens, ok)
    delta_rows = tl.load(delta + (b * heads + h) * q_len + tokens, mask=ok, other=0.0)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    key_valid += b * kv_len
    kv_order += map_id.to(tl.int64) * kv_order_stride
    entries, tiles = row_list(start, entries, row, OTHER, UNIT)

    acc = tl.zeros([OWN, WIDTH], tl.float32)
    ragged = 0
    if not (PACKED or VALID):
        ragged = ragged_tiles(entries, tiles, kv_len, OTHER, UNIT)
    for tile in tl.range(0, tiles - ragged):
        acc = _visit_keys(
            acc, q_rows, d_out_rows, lse_rows, delta_rows, k, v, k_n, v_n, key_valid, entries, tile, kv_len, kv_order,
            scale, D, WIDTH, OTHER, UNIT, PACKED, KV_ORDERED, VALID, PACKED or VALID,
        )  # fmt: skip
    if not (PACKED or VALID):
        for tile in tl.range(tiles - ragged, tiles, num_stages=1):
            acc = _visit_keys(
                acc, q_rows, d_out_rows, lse_rows, delta_rows, k, v, k_n, v_n, key_valid, entries, tile, kv_len,
                kv_order, scale, D, WIDTH, OTHER, UNIT, PACKED, KV_ORDERED, VALID, True,
            )  # fmt: skip
    store_rows(dq + b * dq_b + h * dq_h, tokens, dq_n, ok, acc * scale, D, WIDTH)


@triton.jit
def _visit_keys(
    acc, q_rows, d_out_rows, lse_rows, delta_rows, k, v, k_n, v_n, key_valid, entries, tile, kv_len, kv_order, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, OTHER: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    ORDERED: tl.constexpr, VALID: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add ``dS K`` of one tile of keys."""
    tokens, ok = listed_tokens(entries, tile, kv_len, kv_order, OTHER, UNIT, PACKED, ORDERED)
    if VALID:
        ok = ok & (tl.load(key_valid + tokens, mask=ok, other=0) != 0)
    k_rows = load_rows(k, tokens, k_n, ok, D, WIDTH, MASKED)
    v_rows = load_rows(v, tokens, v_n, ok, D, WIDTH, MASKED)
    scores = tl.dot(q_rows, tl.trans(k_rows), input_precision="ieee")
    weights = tl.exp2(scores * (scale * 1.4426950408889634) - lse_rows[:, None])
    if MASKED:
        weights = tl.where(ok[None, :], weights, 0.0)
    d_weights = tl.dot(d_out_rows, tl.trans(v_rows), input_precision="ieee")
    d_scores = weights * (d_weights - delta_rows[:, None])
    return tl.dot(d_scores.to(k_rows.dtype), k_rows, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "map_heads", "q_len", "kv_len", "q_order_stride", "kv_order_stride"])
def dkv_kernel(
    q, k, v, d_out, lse, delta, dk, dv, tasks, start, entries, q_order, kv_order, key_valid,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, d_out_b, d_out_h, d_out_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    heads, map_heads, q_len, kv_len, q_order_stride, kv_order_stride, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, UNIT: tl.constexpr,
    PACKED: tl.constexpr, Q_ORDERED: tl.constexpr, KV_ORDERED: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """One task of keys: their gradient and their values', over the queries that see them."""
    map_id, row, first, count, b, h = place(tasks, heads, map_heads)
    tokens, ok = own_tokens(kv_order, map_id, kv_order_stride, first, count, OWN, KV_ORDERED)
    seen = ok
    if VALID:
        seen = ok & (tl.load(key_valid + b * kv_len + tokens, mask=ok, other=0) != 0)
    k_rows = load_rows(k + b * k_b + h * k_h, tokens, k_n, seen, D, WIDTH, True)
    v_rows = load_rows(v + b * v_b + h * v_h, tokens, v_n, seen, D, WIDTH, True)
    q += b * q_b + h * q_h
    d_out += b * d_out_b + h * d_out_h
    lse += (b * heads + h) * q_len
    delta += (b * heads + h) * q_len
    q_order += map_id.to(tl.int64) * q_order_stride
    entries, tiles = row_list(start, entries, row, OTHER, UNIT)

    dk_rows = tl.zeros([OWN, WIDTH], tl.float32)
    dv_rows = tl.zeros([OWN, WIDTH], tl.float32)
    for tile in tl.range(0, tiles):
        dk_rows, dv_rows = _visit_queries(
            dk_rows, dv_rows, k_rows, v_rows, q, d_out, lse, delta, q_n, d_out_n, entries, tile, q_len, q_order, scale,
            D, WIDTH, OTHER, UNIT, PACKED, Q_ORDERED,
        )  # fmt: skip
    if VALID:  # a dropped key was read as zeros, which queries do see
        dk_rows = tl.where(seen[:, None], dk_rows, 0.0)
        dv_rows = tl.where(seen[:, None], dv_rows, 0.0)
    store_rows(dk + b * dk_b + h * dk_h, tokens, dk_n, ok, dk_rows * scale, D, WIDTH)
    store_rows(dv + b * dv_b + h * dv_h, tokens, dv_n, ok, dv_rows, D, WIDTH)


@triton.jit
def _visit_queries(
    dk_rows, dv_rows, k_rows, v_rows, q, d_out, lse, delta, q_n, d_out_n, entries, tile, q_len, q_order, scale,
    D: tl.constexpr, WIDTH: tl.constexpr, OTHER: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    ORDERED: tl.constexpr,
):  # fmt: skip
    """Add ``dS^T Q`` and ``P^T dO`` of one tile of queries. An absent one is read as zeros and has weight 0."""
    tokens, ok = listed_tokens(entries, tile, q_len, q_order, OTHER, UNIT, PACKED, ORDERED)
    q_rows = load_rows(q, tokens, q_n, ok, D, WIDTH, True)
    d_out_rows = load_rows(d_out, tokens, d_out_n, ok, D, WIDTH, True)
    lse_rows = _binary_lse(lse, tokens, ok)
    delta_rows = tl.load(delta + tokens, mask=ok, other=0.0)
    scores = tl.dot(k_rows, tl.trans(q_rows), input_precision="ieee")
    weights = tl.exp2(scores * (scale * 1.4426950408889634) - lse_rows[None, :])
    dv_rows = tl.dot(weights.to(d_out_rows.dtype), d_out_rows, dv_rows, input_precision="ieee")
    d_weights = tl.dot(v_rows, tl.trans(d_out_rows), input_precision="ieee")
    d_scores = weights * (d_weights - delta_rows[None, :])
    return tl.dot(d_scores.to(q_rows.dtype), q_rows, dk_rows, input_precision="ieee"), dv_rows


@triton.jit
def _binary_lse(lse, tokens, ok):
    """The LSE in units of the binary logarithm; infinite, so that all weights are 0, for queries without keys."""
    rows = tl.load(lse + tokens, mask=ok, other=-float("inf"))
    return tl.where(rows == -float("inf"), float("inf"), rows * 1.4426950408889634)
