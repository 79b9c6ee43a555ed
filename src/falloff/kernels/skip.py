"""What a kernel must do that leaves key blocks out while it computes: SpargeAttn's second stage (arXiv:2502.18137).

A query block visits the key blocks that its plan keeps, in ascending order, with a running maximum m, sum l and
accumulator O of every query, as flash attention does. With logits in base 2, S = scale log2(e) q k^T, a visited block
is left out when

    max over the block's queries of (rowmax(S) - m) + margin <= 0,

that is, when none of its weights would exceed 2^-margin of the largest so far; then neither l nor O takes it up, and
the result stays an average of values. The rule is that of the published code, where the paper adds such a block to l.
What is left out depends on the order of visits, so that this belongs to running a plan and not to the plan.

This is the specification, in eager operations: it shows what a margin would save and what it would cost.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from falloff.kernels.check import check_call
from falloff.kernels.errors import UnsupportedError
from falloff.plan import Plan


class Skipping(NamedTuple):
    """out [B, H, Nq, D] and LSE [B, H, Nq] over what was computed; ``skipped``: which of the plan's pairs of blocks
    were left out, bool [B, H, Tq, Tk]."""

    out: Tensor
    lse: Tensor
    skipped: Tensor


def attention_skipping(
    plan: Plan,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    margin: float | Tensor,
    protected: int = 2,
    scale: float | None = None,
    key_valid: Tensor | None = None,
) -> Skipping:
    """Attention over a plan's pairs but for blocks that come too late to matter, as ``falloff.kernels.run`` otherwise.

    ``margin``: in bits, at least 0, or a tensor [H] for heads; infinity leaves nothing out, and the published code
    has 50. ``protected``: the last blocks of every row that are computed in any case; the published code has 2 on
    Ampere and Ada, and 1 on Hopper. The first is computed always. Memory grows with Nq * Nkv.

    Raises ``KernelError`` when the tensors do not fit the plan, ``UnsupportedError`` for a plan whose skipped blocks
    answer by a summary, and ``ValueError`` for a negative margin or protection.
    """
    check_call(plan, q_BHND, k_BHND, v_BHND, key_valid)
    if plan.summary:
        raise UnsupportedError("blocks left out on the way would need a summary; give a plan without one")
    margin_H = torch.as_tensor(margin, device=q_BHND.device).reshape(-1, 1)
    if protected < 0 or bool((margin_H < 0).any() | margin_H.isnan().any()):
        raise ValueError(f"margin and protected must be at least 0, got {margin} and {protected}")
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q_BHND, k_BHND, v_BHND))
    if key_valid is not None:
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0) for x in (k, v))
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e) * (q @ k.mT)
    lead = q.shape[:2]
    q_block, kv_block = (block.expand(*lead, -1) for block in (plan.q_block_of(), plan.kv_block_of()))
    on = plan.blocks.dense().expand(*lead, -1, -1)
    later = on.flip(-1).cumsum(-1).flip(-1) - on.long()
    top = torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    skipped = torch.zeros_like(on)
    for j in range(on.shape[3]):
        seen = (kv_block == j)[:, :, None, :] & on[..., j].gather(2, q_block)[..., None]
        if key_valid is not None:
            seen = seen & key_valid[:, None, None, :]
        own = scores.masked_fill(~seen, -torch.inf)
        highest = own.amax(-1)
        rise = (highest - top).masked_fill(highest == -torch.inf, -torch.inf)
        most = torch.full_like(on[..., j], -torch.inf, dtype=exact).scatter_reduce(2, q_block, rise, "amax")
        skipped[..., j] = on[..., j] & (most + margin_H <= 0) & (later[..., j] >= protected)
        new_top = torch.maximum(top, highest)
        fade = (top - new_top).masked_fill(top == -torch.inf, -torch.inf).exp2()
        taken = ~skipped[..., j].gather(2, q_block)[..., None]
        weights = (own - new_top[..., None]).masked_fill(~(seen & taken), -torch.inf).exp2()
        total = total * fade + weights.sum(-1)
        out = out * fade[..., None] + weights @ v
        top = new_top
    empty = total == 0
    lse = (top + total.log2()) * math.log(2)
    out = out / total.masked_fill(empty, 1)[..., None]
    return Skipping(out.to(q_BHND.dtype), lse.masked_fill(empty, -torch.inf), skipped)
