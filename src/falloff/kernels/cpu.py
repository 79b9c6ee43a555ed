"""Gather the blocks a row sees, then PyTorch's flash operator for CPUs on whole chunks of rows.

No masks and no padding inside a call (see launch.py); the gather costs a few percent of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falloff.kernels import skip
from falloff.kernels.launch import Chunk, Launch, launch
from falloff.kernels.merge import merge
from falloff.kernels.needs import Needs
from falloff.kernels.units import from_units, to_units
from falloff.plan import Plan

Core = Callable[[Launch, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Units of q, k, v [units, unit, D] to units of out and of the LSE [units, unit]."""
Inner = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""Attention over rows: q [rows, n, D], k and v [rows, m, D], scale -> out [rows, n, D], LSE [rows, n]."""
Fit = Callable[[Chunk], int]
"""How many of a chunk's rows one call takes."""

GATHERED_BYTES = 2 << 20
"""Keys gathered for one call: larger ones leave the cache, smaller ones pay more for starting threads."""
SCORES = 1 << 20
"""Scores held at once where they are materialised: about the size of a core's cache."""

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference, at a cost proportional to the plan's density. Differentiable through out and LSE.

    With ``skip`` the first product is made twice: for the decision, then for what remains, which takes longer than
    to leave out nothing.
    """
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BHND, k_BHND, v_BHND))
    if plan.skip is not None:
        plan = skip.remaining(plan, skip.late_in_rows(plan, q_BHND, k_BHND, scale, key_valid_BN))
    elif plan.density == 1 and key_valid_BN is None and not differentiable:
        q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q_BHND, k_BHND, v_BHND))
        out, lse = _flash(q, k, v, scale=scale)  # which takes any other stride, and silently misreads this one
        return out, lse
    return in_units(plan, q_BHND, k_BHND, v_BHND, key_valid_BN, partial(_Attention.apply, scale))


def in_units(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, key_valid_BN: Tensor | None, core: Core
) -> tuple[Tensor, Tensor]:
    """Run ``core`` on units of tokens in the plan's order, and bring its results back to the caller's."""
    lists = launch(plan, q_BHND.shape[0], q_BHND.shape[1], key_valid_BN)
    q = to_units(q_BHND, lists.q_order, lists.q_unit)
    k = to_units(k_BHND, lists.kv_order, lists.k_unit)
    v = to_units(v_BHND, lists.kv_order, lists.k_unit)
    out, lse = core(lists, q, k, v)
    lse = from_units(lse[..., None], lists.q_order, (*q_BHND.shape[:3], 1))
    return from_units(out, lists.q_order, q_BHND.shape), lse.squeeze(-1)


def refuse(needs: Needs) -> str | None:
    device, plan = needs.q_BHND.device, needs.plan
    if device.type != "cpu":
        return f"it runs on CPUs, the tensors are on {device}"
    if plan.skip is not None and not (isinstance(plan.q_sizes, int) and isinstance(plan.kv_sizes, int)):
        return "to leave blocks out while it computes it needs blocks of one size, the plan's vary"
    return None


def gather(x_UTD: Tensor, units_RM: Tensor, into: Tensor | None = None) -> Tensor:
    """Rows of units, end to end: [rows, m * unit, D]; in memory of ``into`` where that is given."""
    place = None if into is None else into[: units_RM.numel()]
    rows = torch.index_select(x_UTD, 0, units_RM.flatten(), out=place)
    return rows.view(len(units_RM), -1, x_UTD.shape[2])


def split(chunks: list[Chunk], fit: Fit) -> Iterator[Chunk]:
    """Cut chunks into calls of about equal size, of at most ``fit(chunk)`` rows each."""
    for chunk in chunks:
        calls = -(-len(chunk.q_units) // max(1, fit(chunk)))
        for q_units, k_units in zip(chunk.q_units.chunk(calls), chunk.k_units.chunk(calls), strict=True):
            yield chunk._replace(q_units=q_units, k_units=k_units)


def over_chunks(
    inner: Inner, fit: Fit, scale: float, lists: Launch, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Units of out and LSE from units of q, k, v, by an inner attention over gathered rows."""
    out = torch.zeros_like(q)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    calls = list(split(lists.chunks, fit))
    most = max((call.k_units.numel() for call in calls), default=0)
    k_kept, v_kept = (x.new_empty(most, *x.shape[1:]) for x in (k, v))  # fresh memory is dear, call after call
    for q_units, k_units, keys, more in calls:
        index = q_units.flatten()
        k_rows, v_rows = (gather(x, k_units, kept)[:, :keys] for x, kept in ((k, k_kept), (v, v_kept)))
        answer = inner(gather(q, q_units), k_rows, v_rows, scale)
        out_units, lse_units = answer[0].reshape(-1, *q.shape[1:]), answer[1].reshape(-1, q.shape[1])
        if more:
            before = out.index_select(0, index), lse.index_select(0, index)
            out_units, lse_units = merge(before, (out_units, lse_units))
        out.index_copy_(0, index, out_units)
        lse.index_copy_(0, index, lse_units.to(lse.dtype))
    return out, lse


class _Attention(torch.autograd.Function):
    """Units of q, k, v [units, unit, D] to units of out and LSE [units, unit]."""

    @staticmethod
    def forward(ctx: Any, scale: float, lists: Launch, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = over_chunks(_flash_rows, _fit_gathered(k), scale, lists, q, k, v)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lists, ctx.scale = lists, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 5
        d_out = torch.zeros_like(out) if d_out is None else d_out.contiguous()
        if d_lse is None:
            grads = _backward(q, k, v, out, lse, d_out, ctx.lists, ctx.scale)
        else:
            grads = _backward_with_lse(q, k, v, out, lse, d_out, d_lse, ctx.lists, ctx.scale)
        return None, None, *(grad.to(q.dtype) for grad in grads)


def _flash_rows(q_RND: Tensor, k_RMD: Tensor, v_RMD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = _flash(q_RND[:, None], k_RMD[:, None], v_RMD[:, None], scale=scale)
    return out, lse


def _fit_gathered(k: Tensor) -> Fit:
    key_bytes = k.shape[2] * k.element_size()
    return lambda chunk: GATHERED_BYTES // (chunk.keys * key_bytes)


def fit_scores(q_unit: int) -> Fit:
    """As many rows a call as keep its scores in cache."""
    return lambda chunk: SCORES // (chunk.q_units.shape[1] * q_unit * chunk.keys)


def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, d_out: Tensor, lists: Launch, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of units when only the output has one, by the operator's own backward."""
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    for q_units, k_units, keys, _ in split(lists.chunks, _fit_gathered(k)):
        k_rows, v_rows = (gather(x, k_units)[:, None, :keys] for x in (k, v))
        q_rows, out_rows, d_out_rows = (gather(x, q_units)[:, None] for x in (q, out, d_out))
        lse_rows = lse[q_units].flatten(1)[:, None]
        grads = _flash_backward(d_out_rows, q_rows, k_rows, v_rows, out_rows, lse_rows, 0.0, False, scale=scale)
        d_q.index_add_(0, q_units.flatten(), grads[0].reshape(-1, *q.shape[1:]).to(d_q.dtype))
        _add_rows(d_k, k_units, grads[1][:, 0])
        _add_rows(d_v, k_units, grads[2][:, 0])
    return d_q, d_k, d_v


def _backward_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor,
    lists: Launch,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of units when the LSE has one too, as in a merge: ``dS = P (dP - (delta - dLSE))``.

    ``dP = dO V^T`` and ``delta = rowsum(dO O)``. The operator's backward knows no gradient of the LSE.
    """
    d_q, d_k, d_v = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v))
    shift = (d_out.to(lse.dtype) * out).sum(-1) - d_lse
    for q_units, k_units, keys, _ in split(lists.chunks, fit_scores(lists.q_unit)):
        k_rows, v_rows = (gather(x, k_units)[:, :keys].to(lse.dtype) for x in (k, v))
        q_rows, d_out_rows = (gather(x, q_units).to(lse.dtype) for x in (q, d_out))
        lse_rows, shift_rows = (x[q_units].flatten(1)[..., None] for x in (lse, shift))
        p = torch.exp(scale * (q_rows @ k_rows.mT) - lse_rows)
        d_s = scale * p * (d_out_rows @ v_rows.mT - shift_rows)
        d_q.index_add_(0, q_units.flatten(), (d_s @ k_rows).view(-1, *q.shape[1:]))
        _add_rows(d_k, k_units, d_s.mT @ q_rows)
        _add_rows(d_v, k_units, p.mT @ d_out_rows)
    return d_q, d_k, d_v


def _add_rows(sums: Tensor, units_RM: Tensor, rows_RND: Tensor) -> None:
    """Add rows [rows, keys, D] to the units they were gathered from; a cut ragged tail gets nothing."""
    tokens = units_RM.shape[1] * sums.shape[1]
    if rows_RND.shape[1] < tokens:
        rows_RND = torch.nn.functional.pad(rows_RND, (0, 0, 0, tokens - rows_RND.shape[1]))
    sums.index_add_(0, units_RM.flatten(), rows_RND.reshape(-1, *sums.shape[1:]).to(sums.dtype))
