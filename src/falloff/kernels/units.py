"""Tokens [B, H, N, D] as units [B * H * units, unit, D] in the plan's order, and back. Differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from falloff.kernels.launch import Order


def to_units(x_BHND: Tensor, order: Order | None, unit: int) -> Tensor:
    """In the plan's order, zero-padded to whole units: contiguous [B * H * units, unit, D]."""
    length, width = x_BHND.shape[2:]
    if order is not None:
        x_BHND = _permuted(x_BHND, order)
    if length % unit:
        x_BHND = F.pad(x_BHND, (0, 0, 0, unit - length % unit))
    return x_BHND.reshape(-1, unit, width)


def from_units(x_UTD: Tensor, order: Order | None, shape: Sequence[int]) -> Tensor:
    """The inverse of ``to_units``, to [B, H, N, D]."""
    batch, heads, length, width = shape
    x_BHND = x_UTD.view(batch, heads, -1, width)[:, :, :length]
    return x_BHND if order is None else _permuted(x_BHND, Order(order.put, order.take))


def _permuted(x_BHND: Tensor, order: Order) -> Tensor:
    rows: Tensor = _Permute.apply(x_BHND.reshape(-1, x_BHND.shape[3]), order.take, order.put)  # type: ignore[no-untyped-call]  # torch's
    return rows.view(x_BHND.shape)


class _Permute(torch.autograd.Function):
    """``x[take]``; its gradient is gathered too, which is faster than the scatter of ``index_select``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, take: Tensor, put: Tensor) -> Tensor:
        ctx.save_for_backward(put)
        return x.index_select(0, take)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (put,) = ctx.saved_tensors
        return grads[0].index_select(0, put), None, None
