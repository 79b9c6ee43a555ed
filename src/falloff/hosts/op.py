"""How a call reaches its session: directly in eager mode, through opaque operators from a compiled model.

A compiler sees neither steps nor plans: what changes from layer to layer and step to step is looked up inside the
operators, by a number in a 0-d int64 CPU tensor. Numbers as Python ints would compile every layer anew, and the
grid as Python state would reach a fully compiled model one call late, so the grid is in a tensor as well.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

from falloff.geometry import Grid
from falloff.hosts import autocast
from falloff.hosts.shards import Shards, shards_of
from falloff.session import DenseBackend, Seat, Session

_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None)
_TAGS: dict[str, Any] = {"tags": (_UNSAFE,)} if _UNSAFE is not None else {}
"""A replayed CUDA graph would repeat the decisions of the captured step. Older PyTorch has no word for it."""


class Scene:
    """Where the calls of an attached model stand: the grid of the last forward to start, for all of its layers.

    It stays after the forward, because gradient checkpointing runs layers again during the backward.
    ``count``: processes that share the tokens. ``square_mask``: see ``Host``. ``layout``: grid, zeros when unknown, and
    count as int64 [4], for traced code.
    """

    def __init__(self, square_mask: bool) -> None:
        self.square_mask = square_mask
        self.grid: Grid | None = None
        self.count = 1
        self.layout = _layout(None, 1)

    def set(self, grid: Grid | None, count: int) -> None:
        """A forward starts. A new tensor takes longer than a call, so that it is made for a new grid alone."""
        if (grid, count) != (self.grid, self.count):
            self.grid, self.count, self.layout = grid, count, _layout(grid, count)


class Slot:
    """What one attention layer leads to. ``number``: its own for as long as somebody keeps it, 0-d int64.

    Not a dataclass, because compilers look into the fields of those.
    """

    def __init__(self, session: Session, seat: Seat, dense: DenseBackend, scene: Scene) -> None:
        self.session, self.seat, self.dense, self.scene = session, seat, dense, scene
        number = next(_numbers)
        _slots[number] = self
        self.number = torch.tensor(number, device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Slot:
        """A layer that is copied by itself goes on leading here; that of a copied model gets a slot of its own."""
        return self


_numbers = itertools.count()
_slots: weakref.WeakValueDictionary[int, Slot] = weakref.WeakValueDictionary()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slot: Slot,
    scale: float | None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Self-attention through the slot's session, [B, S, H, D].

    ``mask``: as for PyTorch's attention, or ``None``. ``hidden``: the layer's input, for a method that reads it.
    """
    query, key, value = autocast.cast(query, key, value)
    scene = slot.scene
    if torch.compiler.is_compiling():
        out, _ = torch.ops.falloff.attention(query, key, value, mask, slot.number, scene.layout, scale, hidden)
        return out  # type: ignore[no-any-return]  # torch.ops has no types
    return _called(query, key, value, mask, slot, scene.grid, scene.count, scale, hidden)[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slot: Tensor,
    layout: Tensor,
    scale: float | None,
    hidden: Tensor | None,
) -> tuple[Tensor, bool]:
    return _called(query, key, value, mask, _slots[int(slot)], *_read(layout), scale, hidden)


def _called(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slot: Slot,
    grid: Grid | None,
    count: int,
    scale: float | None,
    hidden: Tensor | None,
) -> tuple[Tensor, bool]:
    shards = None if count == 1 else _shards(slot.seat, grid, count, query)
    if shards is not None:
        query, key, value, mask = (*map(shards.joined, (query, key, value)), shards.joined_mask(mask))
    out, planned = slot.session.attend(
        slot.seat, query, key, value, grid=grid, dense=slot.dense, mask=mask, scale=scale, hidden=hidden
    )
    return (out if shards is None else shards.split(out)), planned


def _layout(grid: Grid | None, count: int) -> Tensor:
    sizes = (0, 0, 0) if grid is None else (grid.frames, grid.height, grid.width)
    return torch.tensor((*sizes, count), device="cpu")


def _read(layout: Tensor) -> tuple[Grid | None, int]:
    frames, height, width, count = layout.tolist()
    return (Grid(frames, height, width) if frames else None), count


def _shards(seat: Seat, grid: Grid | None, count: int, query: Tensor) -> Shards | None:
    """How the tokens of a call lie if not in the model's order."""
    if count == 1 or grid is None or seat.text_side is None:
        return None
    return shards_of(count, query.shape[1], grid.tokens, seat.text_side)


@torch.library.custom_op("falloff::attention", mutates_args=(), **_TAGS)
def _attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slot: Tensor,
    layout: Tensor,
    scale: float | None,
    hidden: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output [B, S, H, D], and a 0-d CPU bool: whether a plan computed it, which the gradient must know."""
    here = _slots[int(slot)]
    here.session.refuse_compiled_training(here.seat)
    out, planned = _attend(query, key, value, mask, slot, layout, scale, hidden)
    return out.contiguous(), torch.tensor(planned, device="cpu")


@_attention_op.register_fake
def _(query: Tensor, *unused: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, torch.empty((), dtype=torch.bool, device="cpu")


@torch.library.custom_op("falloff::attention_backward", mutates_args=(), **_TAGS)
def _attention_backward_op(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    slot: Tensor,
    layout: Tensor,
    planned: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: the call is run again, with autograd, as it was run before."""
    here = _slots[int(slot)]
    grid, count = _read(layout) if bool(planned) else (None, 1)
    shards = _shards(here.seat, grid, count, query)
    # PyTorch keeps autograd out of an operator's body; this lets it in again.
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False), torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        given, mask = (inputs, mask) if shards is None else (map(shards.joined, inputs), shards.joined_mask(mask))
        out = here.session.attend_again(here.seat, *given, grid=grid, dense=here.dense, mask=mask, scale=scale)
        out = out if shards is None else shards.split(out)
        dq, dk, dv = torch.autograd.grad(out, inputs, grad)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_attention_backward_op.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, mask, slot, layout, ctx.scale, _ = inputs
    ctx.save_for_backward(query, key, value, mask, slot, layout, output[1])
    ctx.mark_non_differentiable(output[1])


def _attention_gradient(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.falloff.attention_backward(grad, *ctx.saved_tensors, ctx.scale)
    return (*gradients, None, None, None, None, None)


_attention_op.register_autograd(_attention_gradient, setup_context=_save)
