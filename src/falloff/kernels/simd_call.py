"""What the C++ of simd/ is told of tensors and of blocks, as packed.hpp has it."""

from __future__ import annotations

from ctypes import Structure, c_float, c_int64, c_void_p

import torch
from torch import Tensor


class Strided(Structure):
    """float32 [B, H, N, D] or [B, H, N] with strides of the first three; no stride in D."""

    _fields_ = (("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64))


class Side(Structure):
    _fields_ = (
        ("order", c_void_p),
        ("first", c_void_p),
        *((name, c_int64) for name in ("order_batch", "order_head", "first_batch", "first_head", "blocks", "tokens")),
        ("valid", c_void_p),
    )


TENSORS = ("q", "k", "v", "d_out", "lse", "shift", "out", "d_q", "d_k", "d_v")


class Call(Structure):
    """As in the C++."""

    _fields_ = (
        *((name, c_int64) for name in ("batch", "heads", "channels", "threads", "tasks", "panels")),
        ("rows", Side),
        ("columns", Side),
        *((name, c_void_p) for name in ("start", "task", "at", "list")),
        *((name, c_int64) for name in ("map_batch", "map_head")),
        ("scale", c_float),
        ("skip", c_float),
        ("protect", c_int64),
        ("summary", c_int64),
        ("parts", c_int64),
        *((name, Strided) for name in TENSORS),
    )


def starts(sizes_BHT: Tensor) -> Tensor:
    """Where blocks start, and the end, [B|1, H|1, T + 1]."""
    return torch.nn.functional.pad(sizes_BHT.cumsum(-1), (1, 0))


def channels_together(x_BHND: Tensor) -> Tensor:
    return x_BHND if x_BHND.stride(3) == 1 else x_BHND.contiguous()


def side(order: Tensor | None, first: Tensor, blocks: int, tokens: int) -> Side:
    made = Side(first=first.data_ptr(), blocks=blocks, tokens=tokens)
    made.first_batch, made.first_head = _lead_strides(first)
    if order is not None:
        made.order = order.data_ptr()
        made.order_batch, made.order_head = _lead_strides(order)
    return made


def _lead_strides(x: Tensor) -> tuple[int, int]:
    """How far batch entries and heads of [N] or contiguous [B|1, H|1, N] lie apart; 0 where they share."""
    if x.ndim == 1:
        return 0, 0
    batch, head = (0 if n == 1 else step for n, step in zip(x.shape[:2], x.stride()[:2], strict=True))
    return batch, head
