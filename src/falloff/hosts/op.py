"""The opaque operators a compiled model calls us through.

A compiler sees neither steps nor plans: what changes from layer to layer and step to step is looked up inside the
operators, by a number in a 0-d int64 CPU tensor. Numbers as Python ints would compile every layer anew, and the
grid as Python state would reach a fully compiled model one call late, so the grid is a tensor as well.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falloff.geometry import Grid
from falloff.session import DenseBackend, Seat, Session

_TAGS = tuple(tag for tag in [getattr(torch.Tag, "cudagraph_unsafe", None)] if tag is not None)
"""A replayed CUDA graph would repeat the decisions of the captured step."""


@dataclass(frozen=True, eq=False)
class Slot:
    """What one attention layer leads to."""

    session: Session
    seat: Seat
    dense: DenseBackend


_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


def register_slot(slot: Slot) -> Tensor:
    """A number for a slot, for as long as somebody keeps the slot: 0-d int64."""
    number = next(_numbers)
    _slots[number] = slot
    return torch.tensor(number, device="cpu")


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slot: Tensor, grid: Tensor, scale: float | None
) -> Tensor:
    """Self-attention through the slot's session, [B, S, H, D]; ``grid`` int64 [3], zeros when unknown.

    ``mask``: as for PyTorch's attention, or ``None``.
    """
    if torch.compiler.is_compiling():
        out, _ = torch.ops.falloff.attention(query, key, value, mask, slot, grid, scale)
        return out  # type: ignore[no-any-return]  # torch.ops has no types
    return _attend(query, key, value, mask, slot, grid, scale)[0]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slot: Tensor, grid: Tensor, scale: float | None
) -> tuple[Tensor, bool]:
    here = _slots[int(slot)]
    return here.session.attend(here.seat, query, key, value, grid=_grid(grid), dense=here.dense, mask=mask, scale=scale)


def _grid(grid: Tensor) -> Grid | None:
    frames, height, width = grid.tolist()
    return Grid(frames, height, width) if frames else None


@torch.library.custom_op("falloff::attention", mutates_args=(), tags=_TAGS)
def _attention_op(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slot: Tensor, grid: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D], and a 0-d CPU bool: whether a plan computed it, which the gradient must know."""
    out, planned = _attend(query, key, value, mask, slot, grid, scale)
    return out.contiguous(), torch.tensor(planned, device="cpu")


@_attention_op.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, slot: Tensor, grid: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, torch.empty((), dtype=torch.bool, device="cpu")


@torch.library.custom_op("falloff::attention_backward", mutates_args=(), tags=_TAGS)
def _attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slot: Tensor,
    grid: Tensor,
    planned: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: the call is run again, with autograd, as it was run before."""
    here = _slots[int(slot)]
    seen = _grid(grid) if bool(planned) else None
    # PyTorch keeps autograd out of an operator's body; this lets it in again.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        out = here.session.attend_again(here.seat, *inputs, grid=seen, dense=here.dense, mask=mask, scale=scale)
        dq, dk, dv = torch.autograd.grad(out, inputs, grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, slot, grid, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, slot, grid, output[1])
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.falloff.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None, None)


_attention_op.register_autograd(_attention_gradient, setup_context=_save)
