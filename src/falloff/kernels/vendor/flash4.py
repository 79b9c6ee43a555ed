"""FlashAttention-4 (the CuTe version of flash-attn), forward and backward on Hopper and Blackwell.

On other GPUs it accepts block lists and ignores them, hence the list of those it runs on. Source:
github.com/Dao-AILab/flash-attention, flash_attn/cute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from falloff.kernels.kept import kept
from falloff.kernels.kernel import Kernel
from falloff.kernels.needs import Needs, differentiable
from falloff.kernels.trial import Trial
from falloff.kernels.vendor import probe
from falloff.kernels.vendor.lists import from_order, in_order, lists, refined
from falloff.plan import BlockMap, Plan

ARCHS = (90, 100, 103, 110)
KV_TILE = 128


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from flash_attn.cute import flash_attn_func

    tiles = (_q_tile(q_BHND.device), KV_TILE)
    blocks = kept(plan, ("flash4", tiles), lambda: refined(plan, *tiles))
    rows = kept(plan, ("flash4 rows", tiles), lambda: sparse_tensors(blocks, tiles))
    columns = None
    if differentiable(q_BHND, k_BHND, v_BHND):
        columns = kept(plan, ("flash4 columns", tiles), lambda: sparse_tensors(blocks.transposed, tiles))
    q = in_order(q_BHND, plan.q_order).transpose(1, 2)
    k, v = (in_order(x, plan.kv_order).transpose(1, 2) for x in (k_BHND, v_BHND))
    out_BSHD, lse_BHN = flash_attn_func(
        q,
        k,
        v,
        softmax_scale=scale,
        block_sparse_tensors=rows,
        block_sparse_tensors_bwd=columns,
        return_lse=True,
    )
    out = from_order(out_BSHD.transpose(1, 2), plan.q_order)
    return out, from_order(lse_BHN[..., None], plan.q_order).squeeze(-1)


def sparse_tensors(blocks: BlockMap, tiles: tuple[int, int]) -> Any:
    """All blocks as full ones; the list of blocks with a mask inside is empty, but must be given."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    full = lists(blocks)
    return BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(full.counts),
        mask_block_idx=torch.zeros_like(full.ids[..., :1]),
        full_block_cnt=full.counts,
        full_block_idx=full.ids,
        block_size=tiles,
    )


def absent() -> str | None:
    return probe.wrong_gpu(ARCHS) or probe.missing("flash_attn.cute", "pip install --pre flash-attn-4")


def refuse(needs: Needs) -> str | None:
    device = needs.q_BHND.device
    return (
        probe.wrong_gpu(ARCHS, device)
        or probe.wrong_blocks(needs, _q_tile(device), KV_TILE)
        or probe.wrong_type(needs, probe.HALVES, range(8, 129, 8))
        or probe.unserved(needs, grad=True)
    )


def trial() -> Trial:
    device = torch.device("cuda")
    return Trial(device, torch.bfloat16, 128, _q_tile(device), KV_TILE)


KERNEL = Kernel(
    "flash4",
    "FlashAttention-4: forward and backward on Hopper and Blackwell",
    attention,
    absent,
    refuse,
    by_name=probe.BY_NAME,
    trial=trial,
)


def _q_tile(device: torch.device) -> int:
    """Queries that share a list: one tile on Hopper, two on Blackwell."""
    return 128 if probe.arch(device) == 90 else 256
