"""The specification every other kernel must agree with: softmax under the plan's expanded mask."""

from __future__ import annotations

import torch
from torch import Tensor

from falloff.kernels import skip
from falloff.plan import Plan


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention over the plan's pairs: out [B, H, Nq, D] in q's dtype, LSE [B, H, Nq] in float32 (float64 for float64).

    ``out_i = sum_j P_ij v_j`` with ``P_ij = exp(s_ij - lse_i)``, ``s = scale q k^T`` and
    ``lse_i = log(sum_j exp(s_ij))``, j over the keys that i keeps; 0 and -inf where there are none. Memory grows
    with Nq * Nkv: for tests and small sequences. A plan's summary is one more key and value for every block, which
    the queries that skip the block see. With ``skip`` the blocks that come too late are none of those kept.
    """
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q_BHND, k_BHND, v_BHND))
    valid_keys = None if key_valid_BN is None else key_valid_BN[:, None, None, :]
    if valid_keys is not None:
        k, v = (x.masked_fill(~valid_keys.mT, 0) for x in (k, v))  # 0 * NaN would leak otherwise
    logits = scale * (q @ k.mT)
    if plan.skip is not None:
        plan = skip.remaining(plan, skip.late_blocks(plan, logits, key_valid_BN))
    kept = plan.mask() if valid_keys is None else plan.mask() & valid_keys
    if plan.summary:
        k_mean, v_mean, count = _means(plan, k, v, key_valid_BN)
        skipped = ~plan.blocks_seen(plan.q_block_of()) & (count > 0)[..., None, :]
        kept = torch.cat([kept.expand(*skipped.shape[:2], -1, -1), skipped], -1)
        logits = torch.cat([logits, scale * (q @ k_mean.mT) + count.clamp(min=1).log()[..., None, :]], -1)
        v = torch.cat([v, v_mean], 2)
    empty = ~kept.any(-1, keepdim=True)
    scores = logits.masked_fill(~kept, -torch.inf).masked_fill(empty, 0)
    lse = scores.logsumexp(-1)
    out = (scores - lse[..., None]).exp().masked_fill(empty, 0) @ v
    return out.to(q_BHND.dtype), lse.masked_fill(empty.squeeze(-1), -torch.inf)


def _means(plan: Plan, k: Tensor, v: Tensor, key_valid_BN: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Of every key block: means of its valid keys and values [B, H, Tk, D], and how many they are [B, H, Tk]."""
    block = plan.kv_block_of().expand(*k.shape[:3])
    member = torch.nn.functional.one_hot(block, plan.blocks.shape[3]).to(k.dtype)
    if key_valid_BN is not None:
        member = member * key_valid_BN[:, None, :, None]
    count = member.sum(2)
    mean = member.mT / count.clamp(min=1)[..., None]
    return mean @ k, mean @ v, count
