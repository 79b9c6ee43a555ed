"""Linear attention's own kernels: tokens gathered into states of their blocks, and states spread over tokens again.

A state of D channels is [D, D] products and after them [D] sums. With features phi, values v, and of every token a
factor s and a weight w, which are 1 unless given:

    gather      of a block, the sum over its tokens of phi(x)^T [s v, w]
    spread      phi(x) products, divided by phi(x) sums where asked
    gradient    of x, where phi(x) is answered by s v products^T + w sums^T

Forward and backward of linear attention are each of these once over queries and once over keys. Every number is
written once, by one program: the same bits every time. Offsets are int64, as those of attention.
"""

from __future__ import annotations

import triton
import triton.language as tl

from falloff.kernels.triton_common import load_rows, store_rows


@triton.jit(do_not_specialize=["start_h", "order_h", "tokens"])
def gather_kernel(
    x, values, factor, weight, states, start, order, key_valid,
    x_h, x_n, values_h, values_n, states_h, states_t, start_h, order_h, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, SLICE: tl.constexpr, PHI: tl.constexpr,
    SCALED: tl.constexpr, ORDERED: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """``SLICE`` columns of a block's products, the first slice with its sums. Grid: blocks, slices, heads."""
    block, column, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLICE, tl.program_id(2).to(tl.int64)
    begin = tl.load(start + head * start_h + block)
    end = tl.load(start + head * start_h + block + 1)
    products = tl.zeros([WIDTH, SLICE], tl.float32)
    sums = tl.zeros([WIDTH], tl.float32)
    for first in range(begin, end, OWN):
        rows, ok = _tokens(order + head * order_h, first, end, OWN, ORDERED)
        if VALID:
            ok = ok & (tl.load(key_valid + rows, mask=ok, other=0) != 0)
        phi = _features(load_rows(x + head * x_h, rows, x_n, ok, D, WIDTH, True), ok, D, WIDTH, PHI)
        phi = phi.to(states.dtype.element_ty)
        own, shares = _scaled(
            values, factor, weight, head, rows, ok, column, values_h, values_n, tokens, D, SLICE, SCALED
        )
        products = tl.dot(tl.trans(phi), own.to(phi.dtype), products, input_precision="ieee")
        sums += tl.sum(phi.to(tl.float32) * shares[:, None], 0)
    states += head * states_h + block * states_t
    pointers, inside, of_sums, there = _state(states, column, D, WIDTH, SLICE)
    tl.store(pointers, products.to(states.dtype.element_ty), mask=inside)
    if column == 0:
        tl.store(of_sums, sums.to(states.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["start_h", "order_h", "tokens", "eps"])
def spread_kernel(
    x, states, out, denominators, start, order, key_valid,
    x_h, x_n, states_h, states_t, out_h, out_n, start_h, order_h, tokens, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, SLICE: tl.constexpr, PHI: tl.constexpr,
    DIVIDED: tl.constexpr, LEAST: tl.constexpr, ORDERED: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """``SLICE`` columns of a block's tokens. Grid: blocks, slices, heads.

    ``DIVIDED`` by phi(x) sums + eps, which without eps go to ``denominators`` [H, N]; 0 where no more than ``LEAST``.
    """
    block, column, head = tl.program_id(0).to(tl.int64), tl.program_id(1) * SLICE, tl.program_id(2).to(tl.int64)
    begin = tl.load(start + head * start_h + block)
    end = tl.load(start + head * start_h + block + 1)
    pointers, inside, of_sums, there = _state(states + head * states_h + block * states_t, column, D, WIDTH, SLICE)
    products = tl.load(pointers, mask=inside, other=0.0)
    sums = tl.load(of_sums, mask=there, other=0.0).to(tl.float32)
    for first in range(begin, end, OWN):
        rows, ok = _tokens(order + head * order_h, first, end, OWN, ORDERED)
        seen = ok
        if VALID:
            seen = ok & (tl.load(key_valid + rows, mask=ok, other=0) != 0)
        phi = _features(load_rows(x + head * x_h, rows, x_n, seen, D, WIDTH, True), seen, D, WIDTH, PHI)
        phi = phi.to(products.dtype)
        spread = tl.dot(phi, products, input_precision="ieee")
        if DIVIDED:
            below = tl.sum(phi.to(tl.float32) * sums[None, :], 1)
            empty = below <= LEAST
            spread = tl.where(empty[:, None], 0.0, spread / tl.where(empty, 1.0, below + eps)[:, None])
            if column == 0:
                tl.store(denominators + (head * tokens + rows), tl.where(empty, 0.0, below), mask=ok)
        channel = column + tl.arange(0, SLICE)
        own = out + (head * out_h + rows[:, None] * out_n + channel[None, :])
        tl.store(own, spread.to(out.dtype.element_ty), mask=ok[:, None] & (channel < D)[None, :])


@triton.jit(do_not_specialize=["start_h", "order_h", "tokens"])
def gradient_kernel(
    x, values, factor, weight, states, d_x, start, order, key_valid,
    x_h, x_n, values_h, values_n, states_h, states_t, d_x_h, d_x_n, start_h, order_h, tokens,
    D: tl.constexpr, WIDTH: tl.constexpr, OWN: tl.constexpr, SLICE: tl.constexpr, PHI: tl.constexpr,
    SCALED: tl.constexpr, ORDERED: tl.constexpr, VALID: tl.constexpr,
):  # fmt: skip
    """The gradient of up to ``OWN`` tokens of a block. Grid: blocks, tiles of a block, heads."""
    block, head = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    first = tl.load(start + head * start_h + block) + tl.program_id(1) * OWN
    end = tl.load(start + head * start_h + block + 1)
    if first < end:
        rows, ok = _tokens(order + head * order_h, first, end, OWN, ORDERED)
        seen = ok
        if VALID:
            seen = ok & (tl.load(key_valid + rows, mask=ok, other=0) != 0)
        states += head * states_h + block * states_t
        d_phi = tl.zeros([OWN, WIDTH], tl.float32)
        for column in range(0, D, SLICE):
            pointers, inside, of_sums, there = _state(states, column, D, WIDTH, SLICE)
            products = tl.load(pointers, mask=inside, other=0.0)
            own, shares = _scaled(
                values, factor, weight, head, rows, seen, column, values_h, values_n, tokens, D, SLICE, SCALED
            )
            d_phi = tl.dot(own.to(products.dtype), tl.trans(products), d_phi, input_precision="ieee")
            if column == 0:
                d_phi += shares[:, None] * tl.load(of_sums, mask=there, other=0.0).to(tl.float32)[None, :]
        x_rows = load_rows(x + head * x_h, rows, x_n, seen, D, WIDTH, True).to(tl.float32)
        d_rows = _features_gradient(x_rows, d_phi, seen, D, WIDTH, PHI)
        store_rows(d_x + head * d_x_h, rows, d_x_n, ok, d_rows, D, WIDTH)


@triton.jit
def _tokens(order, first, end, OWN: tl.constexpr, ORDERED: tl.constexpr):
    """Tokens [OWN] from a position on (int64), and which of them there are."""
    rows = first + tl.arange(0, OWN).to(tl.int64)
    ok = rows < end
    if ORDERED:
        rows = tl.load(order + rows, mask=ok, other=0).to(tl.int64)
    return rows, ok


@triton.jit
def _state(state, column, D: tl.constexpr, WIDTH: tl.constexpr, SLICE: tl.constexpr):
    """Pointers to a slice of a state's products and to its sums, and which of them there are."""
    channel, own = tl.arange(0, WIDTH).to(tl.int64), column + tl.arange(0, SLICE).to(tl.int64)
    inside = (channel < D)[:, None] & (own < D)[None, :]
    return state + (channel[:, None] * D + own[None, :]), inside, state + (D * D + channel), channel < D


@triton.jit
def _scaled(
    values, factor, weight, head, rows, ok, column, values_h, values_n, tokens,
    D: tl.constexpr, SLICE: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """A slice of ``s v`` [OWN, SLICE], and w [OWN]; zeros where there is no token."""
    channel = column + tl.arange(0, SLICE).to(tl.int64)
    pointers = values + (head * values_h + rows[:, None] * values_n + channel[None, :])
    own = tl.load(pointers, mask=ok[:, None] & (channel < D)[None, :], other=0.0)
    shares = tl.where(ok, 1.0, 0.0)
    if SCALED:
        own = own.to(tl.float32) * tl.load(factor + (head * tokens + rows), mask=ok, other=0.0)[:, None]
        shares = tl.load(weight + (head * tokens + rows), mask=ok, other=0.0)
    return own, shares


@triton.jit
def _features(rows, ok, D: tl.constexpr, WIDTH: tl.constexpr, PHI: tl.constexpr):
    """phi of rows [OWN, WIDTH], float32; zeros where there is no token or channel."""
    rows, channels = rows.to(tl.float32), (tl.arange(0, WIDTH) < D)[None, :]
    if PHI == "softmax":
        rows = tl.where(channels, rows, -float("inf"))
        shares = tl.exp(rows - tl.max(rows, 1)[:, None])
        phi = shares / tl.sum(shares, 1)[:, None]
    elif PHI == "elu":
        phi = tl.where(rows > 0, rows + 1, tl.exp(tl.minimum(rows, 0.0)))
    else:
        phi = tl.maximum(rows, 0.0)
    return tl.where(ok[:, None] & channels, phi, 0.0)


@triton.jit
def _features_gradient(rows, d_phi, ok, D: tl.constexpr, WIDTH: tl.constexpr, PHI: tl.constexpr):
    """The gradient of rows [OWN, WIDTH] from that of their features; zeros where there is no token."""
    if PHI == "softmax":
        phi = _features(rows, ok, D, WIDTH, PHI)
        d_rows = phi * (d_phi - tl.sum(phi * d_phi, 1)[:, None])
    elif PHI == "elu":
        d_rows = d_phi * tl.exp(tl.minimum(rows, 0.0))
    else:
        d_rows = tl.where(rows > 0, d_phi, 0.0)
    return tl.where(ok[:, None], d_rows, 0.0)
