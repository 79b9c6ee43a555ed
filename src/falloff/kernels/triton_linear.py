"""Linear attention over the blocks of a plan on CUDA devices in Triton; ``linear`` says what it is.

Tokens become states of their blocks and back by kernels of our own (``triton_states``), which make features where they
read tokens. What lies between, the sums of states over a query block's set, is one product for PyTorch's own library.

Backward, with N = phi(Q) H, D = phi(Q) z, O = N / D and g the gradient of D besides:

    dN = dO / D,    dD = g - rowsum(dO O) / D,    dQ by (dN, dD) against (H, z),    (dH, dz) = phi(Q)^T [dN, dD],

and with A, a the sums of dH, dz over the query blocks that a key block is in the set of,

    dK by (V, 1) against (A, a),    dV = phi(K) A.

16-bit tensors have states in bfloat16, since features are sums without bound; all sums over tokens are float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falloff.kernels.groups import Group, groups_within, of_group
from falloff.kernels.kept import kept
from falloff.kernels.triton import delta_of, interpreting, on_device, readable, width
from falloff.kernels.triton_tiles import linear_tile
from falloff.plan import Plan

WORKING_BYTES = 512 << 20
"""Held at once as states and their sums."""
CHUNK = 1024
"""Tokens that share a state where all are summed."""
LEAST = 1e-30
"""A query whose denominator is no more than this has no key it could be answered by, and is given 0."""


@dataclass(frozen=True, eq=False)
class Side:
    """Blocks of queries or of keys: ``start`` int64 [B|1, H|1, T + 1], the ``order`` of tokens [B|1, H|1, N] or their
    own, and the tokens of the ``largest`` block."""

    start: Tensor
    order: Tensor | None
    largest: int

    @property
    def count(self) -> int:
        return self.start.shape[-1] - 1


class Call(NamedTuple):
    """What a pass over some heads is told of one side's tokens; ``valid`` uint8 [N]."""

    side: Side
    group: Group
    features: str
    valid: Tensor | None = None


class Sets(NamedTuple):
    """The key blocks that every query block sums over, [B|1, H|1, Tq, Tk] of zeros and ones; ``None`` for all keys."""

    marks: Tensor | None
    q: Side
    kv: Side

    def sums(self, states: Tensor, group: Group, to: Literal["q", "kv"]) -> Tensor:
        """Of states [H, T, M] of one side, the sums that go ``to`` the blocks of the other."""
        if self.marks is None:
            total = states.sum(1, keepdim=True, dtype=torch.float32).to(states.dtype)
            return total.expand(-1, (self.q if to == "q" else self.kv).count, -1)
        marks = of_group(self.marks, group).to(states.dtype)
        return (marks if to == "q" else marks.mT) @ states


def linear_attention(
    plan: Plan,
    marks: Tensor | None,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    features: str,
    eps: float,
    key_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Out [B, H, Nq, D] in the type of v, and its denominators [B, H, Nq], float32. Differentiable.

    ``marks`` bool [B|1, H|1, Tq, Tk]: the key blocks of every query block; ``None`` for all keys.
    """
    dtype = v_BHND.dtype
    if interpreting():  # the interpreter multiplies bfloat16 by its bits
        q_BHND, k_BHND, v_BHND = q_BHND.float(), k_BHND.float(), v_BHND.float()
    sets = Sets(marks, _side(plan, "q", marks is None), _side(plan, "kv", marks is None))
    out, denominators = _Linear.apply(sets, features, eps, key_valid, q_BHND, k_BHND, v_BHND)  # type: ignore[no-untyped-call]  # torch's own
    return out.to(dtype), denominators


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, sets: Sets, features: str, eps: float, key_valid: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        q, k, v = readable(q), readable(k), readable(v)
        out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
        denominators = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        with on_device(q.device):
            for group, of_q, of_kv in _passes(sets, features, key_valid, q):
                sums = sets.sums(_gather(of_kv, k[group], v[group]), group, "q")
                _spread(of_q, q[group], sums, out[group], (denominators[group], eps))
        ctx.save_for_backward(q, k, v, out, denominators, key_valid)
        ctx.sets, ctx.features, ctx.eps = sets, features, eps
        ctx.set_materialize_grads(False)
        return out, denominators

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_denominators: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, denominators, key_valid = ctx.saved_tensors
        if d_out is None and d_denominators is None:
            return (None,) * 7
        d_out = torch.zeros_like(out) if d_out is None else readable(d_out)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        needs_q, needs_k, needs_v = ctx.needs_input_grad[4:]
        sets: Sets = ctx.sets
        with on_device(q.device):
            answer = _answer(denominators, ctx.eps, delta_of(out, d_out, None), d_denominators)
            for group, of_q, of_kv in _passes(sets, ctx.features, key_valid, q):
                own = (answer[0][group], answer[1][group])
                if needs_q:
                    sums = sets.sums(_gather(of_kv, k[group], v[group]), group, "q")
                    _gradient(of_q, q[group], d_out[group], sums, dq[group], own)
                if needs_k or needs_v:
                    sums = sets.sums(_gather(of_q, q[group], d_out[group], own), group, "kv")
                if needs_k:
                    _gradient(of_kv, k[group], v[group], sums, dk[group])
                if needs_v:
                    _spread(of_kv, k[group], sums, dv[group])
        needed = zip(ctx.needs_input_grad[4:], (dq, dk, dv), strict=True)
        return None, None, None, None, *(grad if need else None for need, grad in needed)


def _answer(denominators: Tensor, eps: float, delta: Tensor, d_denominators: Tensor | None) -> tuple[Tensor, Tensor]:
    """1 / D and dD of every query; zeros for one that no key answers."""
    answered = denominators > 0
    factor = torch.where(answered, 1 / (denominators + eps), 0.0)
    weight = -delta * factor
    if d_denominators is not None:
        weight = torch.where(answered, weight + d_denominators, 0.0)
    return factor, weight


def _passes(sets: Sets, features: str, key_valid: Tensor | None, q: Tensor) -> list[tuple[Group, Call, Call]]:
    """A few heads at a time, and what is told of their queries and of their keys."""
    batch, heads, _, head_dim = q.shape
    head_bytes = (sets.q.count + sets.kv.count) * head_dim * (head_dim + 1) * _state_type(q).itemsize
    valid = None if key_valid is None else key_valid.contiguous().view(torch.uint8)
    return [
        (
            group,
            Call(sets.q, group, features),
            Call(sets.kv, group, features, None if valid is None else valid[group[0]]),
        )
        for group in groups_within(batch, heads, head_bytes, WORKING_BYTES)
    ]


def _gather(call: Call, x_HND: Tensor, values_HND: Tensor, scaled: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """States [H, T, D (D + 1)]. ``scaled``: factor and weight of every token, [H, N]."""
    from falloff.kernels.triton_states import gather_kernel

    heads, _, dim = x_HND.shape
    blocks, tile = call.side.count, linear_tile(dim, x_HND.dtype)
    states = torch.empty(heads, blocks, dim * (dim + 1), dtype=_state_type(x_HND), device=x_HND.device)
    _launch(
        gather_kernel,
        (blocks, -(-dim // tile.other), heads),
        call,
        x_HND,
        (x_HND, values_HND, *(scaled or (x_HND, x_HND)), states),
        (x_HND, values_HND, states),
        SCALED=scaled is not None,
    )
    return states


def _spread(
    call: Call, x_HND: Tensor, states: Tensor, out_HND: Tensor, divided: tuple[Tensor, float] | None = None
) -> None:
    """Fill ``out_HND``. ``divided``: denominators [H, N] to fill and divide by, and what is added to them."""
    from falloff.kernels.triton_states import spread_kernel

    heads, _, dim = x_HND.shape
    denominators, eps = divided or (x_HND, 0.0)
    _launch(
        spread_kernel,
        (call.side.count, -(-dim // linear_tile(dim, x_HND.dtype).other), heads),
        call,
        x_HND,
        (x_HND, states, out_HND, denominators),
        (x_HND, states, out_HND),
        eps=eps,
        DIVIDED=divided is not None,
        LEAST=LEAST,
    )


def _gradient(
    call: Call,
    x_HND: Tensor,
    values_HND: Tensor,
    states: Tensor,
    d_x_HND: Tensor,
    scaled: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Fill ``d_x_HND``. ``scaled``: factor and weight of every token, [H, N]."""
    from falloff.kernels.triton_states import gradient_kernel

    heads, _, dim = x_HND.shape
    _launch(
        gradient_kernel,
        (call.side.count, -(-call.side.largest // linear_tile(dim, x_HND.dtype).own), heads),
        call,
        x_HND,
        (x_HND, values_HND, *(scaled or (x_HND, x_HND)), states, d_x_HND),
        (x_HND, values_HND, states, d_x_HND),
        SCALED=scaled is not None,
    )


def _launch(
    kernel: Any,
    grid: tuple[int, int, int],
    call: Call,
    x_HND: Tensor,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    **own: bool | float,
) -> None:
    """``strided``: the tensors whose first two strides the kernel is told."""
    _, length, dim = x_HND.shape
    tile, side, unused = linear_tile(dim, x_HND.dtype), call.side, x_HND
    start = of_group(side.start, call.group).contiguous()
    order = unused if side.order is None else of_group(side.order, call.group).contiguous()
    kernel[grid](
        *tensors,
        start,
        order,
        unused if call.valid is None else call.valid,
        *(stride for x in strided for stride in x.stride()[:2]),
        0 if len(start) == 1 else start.stride(0),
        0 if side.order is None or len(order) == 1 else order.stride(0),
        length,
        **own,
        D=dim,
        WIDTH=width(dim),
        OWN=tile.own,
        SLICE=min(tile.other, width(dim)),
        PHI=call.features,
        ORDERED=side.order is not None,
        VALID=call.valid is not None,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # as attention's kernels are launched
    )


def _state_type(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float32 else torch.bfloat16


def _side(plan: Plan, side: Literal["q", "kv"], whole: bool) -> Side:
    """The plan's blocks of a side; where all tokens count alike, stretches of them in the given order."""
    return kept(plan, ("linear", side, whole), lambda: _stretches(plan, side) if whole else _blocks(plan, side))


def _stretches(plan: Plan, side: Literal["q", "kv"]) -> Side:
    length, device = plan.q_len if side == "q" else plan.kv_len, plan.blocks.start.device
    start = torch.arange(0, length + CHUNK, CHUNK, device=device).clamp(max=length)
    return Side(start.view(1, 1, -1), None, min(length, CHUNK))


def _blocks(plan: Plan, side: Literal["q", "kv"]) -> Side:
    sizes, sizes_BHT, order = (
        (plan.q_sizes, plan.q_sizes_BHT(), plan.q_order)
        if side == "q"
        else (plan.kv_sizes, plan.kv_sizes_BHT(), plan.kv_order)
    )
    start = torch.nn.functional.pad(sizes_BHT.cumsum(-1), (1, 0))
    largest = sizes if isinstance(sizes, int) else int(sizes_BHT.max())
    return Side(start, _per_map(order), largest)


def _per_map(order: Tensor | None) -> Tensor | None:
    return order if order is None or order.ndim == 3 else order.view(1, 1, -1)
