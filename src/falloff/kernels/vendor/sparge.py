"""SpargeAttn's block-sparse kernel: int8 queries and keys, float8 values. Less exact, so only ever by name.

Values pass through float16, which holds less than bfloat16 can (beyond 65504 they overflow). It gives no LSE that
ours could be merged with. Source: github.com/thu-ml/SpargeAttn, ``block_sparse_sage2_attn_cuda``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from falloff.kernels.kept import kept
from falloff.kernels.kernel import Kernel
from falloff.kernels.needs import Needs
from falloff.kernels.trial import Trial
from falloff.kernels.vendor import probe
from falloff.kernels.vendor.lists import from_order, in_order, refined
from falloff.plan import Plan

ARCHS = (80, 86, 87, 89, 90)
SHORTEST = 128
TOLERANCE = 0.1  # above the noise of 8 bits, far below what a misread map does


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from spas_sage_attn import block_sparse_sage2_attn_cuda

    tiles = _tiles(q_BHND.device)
    batch, heads = q_BHND.shape[:2]
    mask_id = kept(plan, ("sparge", tiles, batch, heads), lambda: mask_ids(plan, tiles, batch, heads))
    q = in_order(q_BHND, plan.q_order)
    k, v = (in_order(x, plan.kv_order) for x in (k_BHND, v_BHND))
    out = block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask_id, scale=scale, tensor_layout="HND")
    return from_order(out, plan.q_order), None


def mask_ids(plan: Plan, tiles: tuple[int, int], batch: int, heads: int) -> Tensor:
    """1 for a computed tile, else 0: int8 [B, H, Tq, Tk]."""
    tiled = refined(plan, *tiles).dense()
    return tiled.expand(batch, heads, -1, -1).to(torch.int8).contiguous()


def absent() -> str | None:
    return probe.wrong_gpu(ARCHS) or probe.missing("spas_sage_attn", "build it from github.com/thu-ml/SpargeAttn")


def refuse(needs: Needs) -> str | None:
    device = needs.q_BHND.device
    why = probe.wrong_gpu(ARCHS, device) or probe.wrong_blocks(needs, *_tiles(device))
    if why is None and needs.plan.q_len < SHORTEST:
        why = f"it takes at least {SHORTEST} queries, got {needs.plan.q_len}"
    return why or probe.wrong_type(needs, probe.HALVES, (64, 128)) or probe.unserved(needs, lse=False)


def trial() -> Trial:
    return Trial(torch.device("cuda"), torch.bfloat16, 128, 128, 128, lse=False)


KERNEL = Kernel(
    "sparge",
    "SpargeAttn: 8-bit inference on Ampere, Ada and Hopper",
    attention,
    absent,
    refuse,
    by_name="by name only, because it computes in 8 bits",
    trial=trial,
    tolerance=TOLERANCE,
)


def _tiles(device: torch.device) -> tuple[int, int]:
    """Queries and keys of a tile; the README has one size for all GPUs, the code another one for Hopper."""
    return (64, 128) if probe.arch(device) == 90 else (128, 64)
