"""Block-sparse attention on CUDA devices in Triton: forward and backward, compiled at first use.

The plan's orders are applied where tokens are read and written, so nothing is copied or permuted. Under Triton's
interpreter (``TRITON_INTERPRET=1``, set before first use) the same code runs on CPUs, slowly, for tests.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falloff.kernels.needs import Needs
from falloff.kernels.skip import PROTECTED
from falloff.kernels.trial import Trial
from falloff.kernels.triton_lists import PACKED_TOKENS, Lists, Side, lists, orders
from falloff.kernels.triton_tiles import HEAD_DIMS, Pass, Tile, architecture, tile_for, tiles_for, whole_blocks
from falloff.plan import Plan

MAX_HEAD_DIM = HEAD_DIMS[-1]


def absent() -> str | None:
    """Why this machine cannot run it; ``None`` where it can."""
    if find_spec("triton") is None:
        return "Triton is not installed; on Linux, pip install triton"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    if torch.version.hip is not None:
        return "its tile sizes are for NVIDIA GPUs"
    return None


def refuse(needs: Needs) -> str | None:
    q, plan = needs.q_BHND, needs.plan
    if (why := refuse_tensors(q)) is not None:
        return why
    if max(plan.q_len, plan.kv_len) > PACKED_TOKENS:
        return f"it takes up to {PACKED_TOKENS} tokens, the plan has {plan.q_len} queries and {plan.kv_len} keys"
    if plan.skip is not None:
        return _refuse_skipping(plan, q)
    return None


def refuse_tensors(q: Tensor) -> str | None:
    """Why none of our Triton kernels takes tensors [B, H, N, D] like these; ``None`` where they do."""
    if q.device.type != ("cpu" if interpreting() else "cuda"):
        where = "CPUs, under TRITON_INTERPRET=1" if interpreting() else "CUDA devices"
        return f"it runs on {where}, the tensors are on {q.device}"
    if q.device.type == "cuda" and (found := torch.cuda.get_device_capability(q.device)) < (8, 0):
        return f"it needs compute capability 8.0, {q.device} has {found[0]}.{found[1]}"
    if q.dtype == torch.float64:
        return "it computes in float32 at most, the tensors are torch.float64"
    if q.shape[3] > MAX_HEAD_DIM:
        return f"it takes head dims up to {MAX_HEAD_DIM}, the tensors have {q.shape[3]}"
    return None


def _refuse_skipping(plan: Plan, q: Tensor) -> str | None:
    arch, dtype = machine(q)
    if whole_blocks(arch, q.shape[3], dtype, plan.q_sizes, plan.kv_sizes) is not None:
        return None
    tiles = tiles_for(arch, "forward", q.shape[3], dtype)
    return (
        f"to leave blocks out while it computes it needs uniform blocks of at most {tiles[0].own} queries, and of 16 "
        f"keys or twice as many up to {tiles[0].other}"
    )


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def trial() -> Trial:
    return Trial(torch.device("cuda"), torch.bfloat16, 128, 128, 128)


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference, at a cost proportional to the plan's density. Differentiable through out and LSE."""
    if scale <= 0:  # the kernels take the largest score before they scale it
        q_BHND, scale = (-q_BHND, -scale) if scale < 0 else (q_BHND * 0, 1.0)
    dtype = q_BHND.dtype
    if dtype == torch.bfloat16 and interpreting():  # the interpreter multiplies bfloat16 by its bits
        q_BHND, k_BHND, v_BHND = q_BHND.float(), k_BHND.float(), v_BHND.float()
    out, lse = _Attention.apply(plan, scale, key_valid_BN, q_BHND, k_BHND, v_BHND)  # type: ignore[no-untyped-call]  # torch's own
    return out.to(dtype), lse


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, scale: float, key_valid: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        from falloff.kernels.triton_forward import forward_kernel

        q, k, v = readable(q), readable(k), readable(v)
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        with on_device(q.device):
            skipping = {"skip": plan.skip or 0.0, "PROTECTED": None if plan.skip is None else PROTECTED}
            _launch(forward_kernel, "forward", plan, (q, k, v, out, lse), (q, k, v, out), scale, key_valid, **skipping)
        ctx.save_for_backward(q, k, v, out, lse, key_valid)
        ctx.plan, ctx.scale = plan, scale
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        from falloff.kernels.triton_backward import dkv_kernel, dq_kernel

        q, k, v, out, lse, key_valid = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 6
        d_out = torch.zeros_like(out) if d_out is None else readable(d_out)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        needs_q, *needs_kv = ctx.needs_input_grad[3:]
        with on_device(q.device):
            read = (q, k, v, d_out, lse, delta_of(out, d_out, d_lse))
            strided = (q, k, v, d_out)
            if needs_q:
                _launch(dq_kernel, "dq", ctx.plan, (*read, dq), (*strided, dq), ctx.scale, key_valid)
            if any(needs_kv):
                _launch(dkv_kernel, "dkv", ctx.plan, (*read, dk, dv), (*strided, dk, dv), ctx.scale, key_valid)
        needed = zip(ctx.needs_input_grad[3:], (dq, dk, dv), strict=True)
        return None, None, None, *(grad if need else None for need, grad in needed)


def _launch(
    kernel: Any,
    phase: Pass,
    plan: Plan,
    tensors: tuple[Tensor, ...],
    strided: tuple[Tensor, ...],
    scale: float,
    key_valid: Tensor | None,
    **skipping: float | None,
) -> None:
    """Run a kernel over the tasks of its side. ``strided``: the tensors [B, H, N, D] whose strides it is told.

    ``skipping``: what the forward kernel must know to leave blocks out.
    """
    batch, heads, q_len, head_dim = tensors[0].shape
    listed, tile = _work(phase, plan, tensors[0])
    q_order, kv_order = orders(plan)
    maps = plan.blocks.shape[:2]
    unused = listed.tasks  # a pointer that a kernel's constants keep it from reading
    kernel[len(listed.tasks), batch * heads // (maps[0] * maps[1])](
        *tensors,
        listed.tasks,
        listed.start,
        listed.entries,
        unused if q_order is None else q_order,
        unused if kv_order is None else kv_order,
        unused if key_valid is None else key_valid.contiguous().view(torch.uint8),
        *(stride for x in strided for stride in x.stride()[:3]),
        heads,
        maps[1],
        q_len,
        plan.kv_len,
        _map_stride(q_order),
        _map_stride(kv_order),
        scale,
        D=head_dim,
        WIDTH=width(head_dim),
        OWN=tile.own,
        OTHER=tile.other,
        UNIT=listed.unit,
        PACKED=listed.packed,
        Q_ORDERED=q_order is not None,
        KV_ORDERED=kv_order is not None,
        VALID=key_valid is not None,
        **skipping,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,  # the default of Triton 3.9, which warns of another to come
    )


def _work(phase: Pass, plan: Plan, q: Tensor) -> tuple[Lists, Tile]:
    arch, dtype = machine(q)
    if plan.skip is not None:
        tile = whole_blocks(arch, q.shape[3], dtype, plan.q_sizes, plan.kv_sizes)
        assert tile is not None  # else the call was refused
        return lists(plan, "q", tile.own, tile.other), tile
    side: Side = "kv" if phase == "dkv" else "q"
    length, sizes, count = (
        (plan.q_len, plan.q_sizes, plan.blocks.shape[2])
        if side == "q"
        else (plan.kv_len, plan.kv_sizes, plan.blocks.shape[3])
    )
    tile = tile_for(arch, phase, q.shape[3], dtype, sizes, length / count)
    return lists(plan, side, tile.own, tile.other), tile


def machine(q: Tensor) -> tuple[int, torch.dtype]:
    """Architecture and type that tiles are chosen for; the interpreter knows no limits, so it runs any."""
    if not q.is_cuda:
        return 80, torch.float16
    return architecture(torch.cuda.get_device_capability(q.device)), q.dtype


def delta_of(out: Tensor, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """``rowsum(dO O) - dLSE`` of every query, float32 [B, H, Nq]."""
    from falloff.kernels.triton_backward import delta_kernel

    batch, heads, q_len, head_dim = out.shape
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    rows = 64
    delta_kernel[-(-q_len // rows), batch * heads](
        out,
        d_out,
        delta if d_lse is None else d_lse.contiguous(),
        delta,
        *out.stride()[:3],
        *d_out.stride()[:3],
        heads,
        q_len,
        D=head_dim,
        WIDTH=width(head_dim),
        TILE=rows,
        LSE=d_lse is not None,
        enable_fp_fusion=True,
    )
    return delta


def width(head_dim: int) -> int:
    """Channels of a tile: the next power of two that tensor cores take."""
    return max(16, 1 << (head_dim - 1).bit_length())


def readable(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _map_stride(order: Tensor | None) -> int:
    """Elements from one map's order to the next's; 0 where all share one."""
    return 0 if order is None or len(order) == 1 else order.stride(0)


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
