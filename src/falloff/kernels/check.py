"""The door of every kernel: shapes, dtypes and devices, checked once before any of them runs."""

from __future__ import annotations

import torch
from torch import Tensor

from falloff.kernels.errors import KernelError
from falloff.plan import Plan

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_call(plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, key_valid_BN: Tensor | None) -> None:
    """Raise ``KernelError`` unless the tensors fit each other and the plan."""
    if q_BHND.ndim != 4:
        raise KernelError(f"q must be [batch, heads, {plan.q_len}, head_dim], got {tuple(q_BHND.shape)}")
    batch, heads, _, head_dim = q_BHND.shape
    for name, x, length in (("q", q_BHND, plan.q_len), ("k", k_BHND, plan.kv_len), ("v", v_BHND, plan.kv_len)):
        if x.shape != (batch, heads, length, head_dim):
            raise KernelError(f"{name} must have shape {(batch, heads, length, head_dim)}, got {tuple(x.shape)}")
        if x.dtype != q_BHND.dtype or x.dtype not in DTYPES:
            raise KernelError(
                f"q, k and v must share one floating dtype, got {q_BHND.dtype} for q, {x.dtype} for {name}"
            )
        _check_device(name, x, plan)
    if min(batch, heads, head_dim) < 1:
        raise KernelError(f"q must hold at least one batch entry, head and channel, got {tuple(q_BHND.shape)}")
    for axis, given, mapped in (("batch", batch, plan.blocks.shape[0]), ("heads", heads, plan.blocks.shape[1])):
        if mapped not in (1, given):
            raise KernelError(f"the plan's maps are for {axis} {mapped}, q has {axis} {given}; expected 1 or {given}")
    if key_valid_BN is not None:
        if key_valid_BN.dtype != torch.bool or key_valid_BN.shape != (batch, plan.kv_len):
            raise KernelError(
                f"key_valid must be bool {(batch, plan.kv_len)}, got {key_valid_BN.dtype} {tuple(key_valid_BN.shape)}"
            )
        _check_device("key_valid", key_valid_BN, plan)


def _check_device(name: str, x: Tensor, plan: Plan) -> None:
    device = plan.blocks.start.device
    if x.device != device:
        raise KernelError(f"{name} is on {x.device}, the plan on {device}; move the plan with plan.to({x.device!s})")
