"""flashinfer's block-sparse attention, forward only.

Two ways in: one map for all heads over whole key blocks, read as it is; and anything else (maps and block sizes of
each head, a ragged end) with every key listed by number, which takes 4 bytes per query block and key. It plans on the
host, so its plan is made once and kept with ours. Its LSE is of base 2. Source: github.com/flashinfer-ai/flashinfer,
flashinfer/sparse.py.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from falloff.kernels.kept import kept
from falloff.kernels.kernel import Kernel
from falloff.kernels.needs import Needs
from falloff.kernels.trial import Trial
from falloff.kernels.vendor import probe
from falloff.kernels.vendor.lists import from_order, in_order
from falloff.plan import Plan

ARCHS = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)
WORKSPACE_BYTES = 128 << 20  # as its documentation advises


class Variable(NamedTuple):
    """Maps bool [B * H, Tq, Tk] and block sizes int32 [B * H, Tq], [B * H, Tk]: a head of its own for every map."""

    maps: Tensor
    q_sizes: Tensor
    kv_sizes: Tensor


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    make, run = (_plan_shared, _run_shared) if is_shared(plan) else (_plan_variable, _run_variable)
    key = ("flashinfer", q_BHND.shape[:2], q_BHND.shape[3], q_BHND.dtype, scale)
    planned = kept(plan, key, lambda: make(plan, q_BHND, scale))
    q = in_order(q_BHND, plan.q_order)
    k, v = (in_order(x, plan.kv_order) for x in (k_BHND, v_BHND))
    out, lse = run(planned, q, k, v)
    return from_order(out, plan.q_order), from_order(lse[..., None] * math.log(2), plan.q_order).squeeze(-1)


def is_shared(plan: Plan) -> bool:
    """Whether a plan has one map for everything and whole blocks of keys."""
    uniform = isinstance(plan.q_sizes, int) and isinstance(plan.kv_sizes, int) and plan.kv_len % plan.kv_sizes == 0
    return uniform and plan.blocks.shape[:2] == (1, 1)


def variable(plan: Plan, batch: int, heads: int) -> Variable:
    def each_head(x: Tensor) -> Tensor:
        return x.expand(batch, heads, *x.shape[2:]).flatten(0, 1).contiguous()

    q_sizes, kv_sizes = (sizes.to(torch.int32) for sizes in (plan.q_sizes_BHT(), plan.kv_sizes_BHT()))
    return Variable(each_head(plan.blocks.dense()), each_head(q_sizes), each_head(kv_sizes))


def absent() -> str | None:
    return probe.wrong_gpu(ARCHS) or probe.missing("flashinfer", "pip install flashinfer-python")


def refuse(needs: Needs) -> str | None:
    why = probe.wrong_gpu(ARCHS, needs.q_BHND.device)
    return why or probe.wrong_type(needs, probe.HALVES, (64, 128, 256)) or probe.unserved(needs)


def trial() -> Trial:
    return Trial(torch.device("cuda"), torch.bfloat16, 128, 128, 128, (True, False), (False, False))


KERNEL = Kernel(
    "flashinfer",
    "flashinfer: inference on GPUs since Ampere, blocks of any size",
    attention,
    absent,
    refuse,
    by_name=probe.BY_NAME,
    trial=trial,
)


def _plan_shared(plan: Plan, q_BHND: Tensor, scale: float) -> Any:
    from flashinfer.sparse import BlockSparseAttentionWrapper

    heads, head_dim = q_BHND.shape[1], q_BHND.shape[3]
    wrapper = BlockSparseAttentionWrapper(_workspace(q_BHND.device))
    wrapper.plan(
        plan.blocks.start.to(torch.int32),
        plan.blocks.columns,
        plan.q_len,
        plan.kv_len,
        plan.q_sizes,
        plan.kv_sizes,
        heads,
        heads,
        head_dim,
        sm_scale=scale,
        q_data_type=q_BHND.dtype,
        kv_data_type=q_BHND.dtype,
        o_data_type=q_BHND.dtype,
    )
    return wrapper


def _run_shared(wrapper: Any, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> tuple[Tensor, Tensor]:
    """One batch entry after the other, [N, H, D] each, for it knows no batches."""
    entries = zip(*(x.transpose(1, 2) for x in (q_BHND, k_BHND, v_BHND)), strict=True)
    answers = [wrapper.run(*(x.contiguous() for x in entry), return_lse=True) for entry in entries]
    out_BNHD, lse_BNH = (torch.stack(parts) for parts in zip(*answers, strict=True))
    return out_BNHD.transpose(1, 2), lse_BNH.transpose(1, 2)


def _plan_variable(plan: Plan, q_BHND: Tensor, scale: float) -> Any:
    from flashinfer.sparse import VariableBlockSparseAttentionWrapper

    batch, heads, _, head_dim = q_BHND.shape
    given = variable(plan, batch, heads)
    wrapper = VariableBlockSparseAttentionWrapper(_workspace(q_BHND.device))
    wrapper.plan(
        given.maps,
        given.q_sizes,
        given.kv_sizes,
        batch * heads,
        batch * heads,
        head_dim,
        sm_scale=scale,
        q_data_type=q_BHND.dtype,
        kv_data_type=q_BHND.dtype,
    )
    return wrapper


def _run_variable(wrapper: Any, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor) -> tuple[Tensor, Tensor]:
    """All heads of all batch entries as heads, [B * H, N, D]."""
    out, lse = wrapper.run(*(x.flatten(0, 1) for x in (q_BHND, k_BHND, v_BHND)), return_lse=True)
    return out.view(q_BHND.shape), lse.view(q_BHND.shape[:3])


@cache
def _workspace(device: torch.device) -> Tensor:
    """Scratch memory that all wrappers of a device share: they run one after the other."""
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
