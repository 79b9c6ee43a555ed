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
from falloff.plan import BlockMap, Plan, Sizes


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

    Raises ``KernelError`` when the tensors do not fit the plan, ``ValueError`` for a negative margin or protection.
    """
    check_call(plan, q_BHND, k_BHND, v_BHND, key_valid)
    margin_H = torch.as_tensor(margin, device=q_BHND.device).reshape(-1, 1)
    if protected < 0 or bool((margin_H < 0).any() | margin_H.isnan().any()):
        raise ValueError(f"margin and protected must be at least 0, got {margin} and {protected}")
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    q, k, v = (x.to(exact) for x in (q_BHND, k_BHND, v_BHND))
    if key_valid is not None:
        k, v = (x.masked_fill(~key_valid[:, None, :, None], 0) for x in (k, v))
    scores = (q.shape[3] ** -0.5 if scale is None else scale) * math.log2(math.e) * (q @ k.mT)
    lead, (q_blocks, kv_blocks) = q.shape[:2], plan.blocks.shape[2:]
    q_block = _block_of(plan, plan.q_len, plan.q_sizes, plan.q_order, q_blocks).expand(*lead, -1)
    kv_block = _block_of(plan, plan.kv_len, plan.kv_sizes, plan.kv_order, kv_blocks).expand(*lead, -1)
    on = plan.blocks.dense().expand(*lead, -1, -1)
    later = on.flip(-1).cumsum(-1).flip(-1) - on.long()
    top = torch.full(q.shape[:3], -torch.inf, dtype=exact, device=q.device)
    total, out = torch.zeros_like(top), torch.zeros_like(q)
    skipped = torch.zeros_like(on)
    for j in range(kv_blocks):
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


def _block_of(plan: Plan, length: int, sizes: Sizes, order: Tensor | None, count: int) -> Tensor:
    """The block of every token in the given order, int64 [B|1, H|1, N]: read off a plan from tokens to blocks."""
    lead, device = plan.blocks.shape[:2], plan.blocks.start.device
    own = torch.eye(count, dtype=torch.bool, device=device).expand(*lead, -1, -1)
    member = Plan(q_len=length, kv_len=count, q_sizes=sizes, kv_sizes=1, blocks=BlockMap.from_dense(own), q_order=order)
    return member.mask().long().argmax(-1)
