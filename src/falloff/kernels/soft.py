"""Softmax attention in which every key block of a plan has a share between 0 and 1 for every query block.

    O_i = sum_j m_ij sum_{t in j} exp(s q_i . k_t) v_t / sum_j m_ij sum_{t in j} exp(s q_i . k_t)

With shares of 0 and 1 alone it is attention over the blocks with 1. It computes every pair, for training what makes the
shares: a gradient reaches them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from falloff.kernels.groups import head_groups, of_group
from falloff.kernels.needs import differentiable
from falloff.plan import Plan

WORKING_BYTES = 256 << 20
"""Held at once beside queries, keys, values and results."""
LEAST = 1e-20
"""A smaller share counts as this one and gets no gradient."""


def soft_attention(
    plan: Plan,
    shares_BHQK: Tensor,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    scale: float,
    key_valid: Tensor | None = None,
) -> Tensor:
    """Out [B, H, Nq, D], float32 at least, by the shares [B|1, H|1, Tq, Tk] of the plan's blocks; its map is not read.

    ``key_valid`` bool [B, Nk] leaves keys out. Differentiable; for a gradient logits are made again instead of kept.
    """
    (batch, heads, _, _), keys = q_BHND.shape, k_BHND.shape[2]
    wide = torch.promote_types(q_BHND.dtype, torch.float32)
    rows = max(1, WORKING_BYTES // (3 * wide.itemsize * keys))
    q_block, kv_block, logs = plan.q_block_of(), plan.kv_block_of(), shares_BHQK.clamp(min=LEAST).log()
    results = []
    for group in head_groups(batch, heads, 1):
        k, v = (x[group].to(wide) for x in (k_BHND, v_BHND))
        hidden = None if key_valid is None else ~key_valid[group[0]]
        if hidden is not None:  # 0 * NaN would leak otherwise
            k, v = (x.masked_fill(hidden[:, None], 0) for x in (k, v))
        by_key = of_group(kv_block, group)
        cut = (torch.split(x, rows, 1) for x in (q_BHND[group], of_group(q_block, group)))
        for q, block in zip(*cut, strict=True):
            given = (q.to(wide) * scale, k, v, of_group(logs, group), block, by_key, hidden)
            if differentiable(q, k, v, logs):
                results.append(checkpoint(_rows, *given, use_reentrant=False, preserve_rng_state=False))
            else:
                results.append(_rows(*given))
    return torch.cat(results, 1).view(batch, heads, -1, v_BHND.shape[-1])


def _rows(
    q: Tensor, k: Tensor, v: Tensor, logs_1QK: Tensor, q_block: Tensor, kv_block: Tensor, hidden: Tensor | None
) -> Tensor:
    """Of some queries of one head [1, n, D]."""
    # index_select, because the gradient of indexing sorts on a GPU
    logits = q @ k.mT + logs_1QK.index_select(1, q_block[0]).index_select(2, kv_block[0]).to(q.dtype)
    if hidden is not None:
        logits = logits.masked_fill(hidden, -torch.inf)
    return logits.softmax(-1) @ v
