"""What a plan's ``skip`` leaves out while it is computed: SpargeAttn's second stage (arXiv:2502.18137).

A query block visits the key blocks that its plan keeps, in ascending order, with a running maximum m, sum l and
accumulator O of every query, as flash attention does. With logits in base 2, S = scale log2(e) q k^T, a visited block
is left out when

    max over the block's queries of (rowmax(S) - m) + skip <= 0,

that is, when none of its weights would exceed 2^-skip of the largest so far; then neither l nor O takes it up, and
the result stays an average of values. The rule is that of the published code, where the paper adds such a block to l.
A row's first block is always computed, and so are its last ``PROTECTED``.

A block left out raises no maximum, so that m before a block is the largest score of all blocks before it, whether they
were left out or not. The blocks to leave out thus follow from the largest score of every query in every block, and
what is computed is attention over the others.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.kernels.product import product
from falloff.plan import BlockMap, Plan

PROTECTED = 2
"""The last blocks of every row that are computed in any case: as the published code for Ampere and Ada."""
SCORES = 1 << 20
"""Scores held at once: about the size of a core's cache."""


def remaining(plan: Plan, late_BHQK: Tensor) -> Plan:
    """The plan of what is computed, once it is known what comes too late."""
    return dataclasses.replace(plan, blocks=BlockMap.from_dense(plan.blocks.dense() & ~late_BHQK), skip=None)


def late_blocks(plan: Plan, logits_BHNN: Tensor, key_valid_BN: Tensor | None) -> Tensor:
    """The blocks that a plan leaves out, bool [B, H, Tq, Tk], from all its scaled logits in the given order."""
    lead, blocks = logits_BHNN.shape[:2], plan.blocks.shape[3]
    q_block, kv_block = (block.expand(*lead, -1) for block in (plan.q_block_of(), plan.kv_block_of()))
    on = plan.blocks.dense().expand(*lead, -1, -1)
    if key_valid_BN is not None:
        logits_BHNN = logits_BHNN.masked_fill(~key_valid_BN[:, None, None, :], -torch.inf)
    highest = torch.full((*logits_BHNN.shape[:3], blocks), -torch.inf, dtype=logits_BHNN.dtype, device=on.device)
    highest.scatter_reduce_(3, kv_block[:, :, None].expand(logits_BHNN.shape), logits_BHNN, "amax")
    seen = on.gather(2, q_block[..., None].expand(highest.shape))
    rise = _rise(highest.masked_fill(~seen, -torch.inf))
    most = torch.full(on.shape, -torch.inf, dtype=rise.dtype, device=on.device)
    most.scatter_reduce_(2, q_block[..., None].expand(rise.shape), rise, "amax")
    later = on.flip(-1).cumsum(-1).flip(-1) - on.long()
    return on & (later >= PROTECTED) & _too_late(plan, most)


def late_in_rows(plan: Plan, q_BHND: Tensor, k_BHND: Tensor, scale: float, key_valid_BN: Tensor | None) -> Tensor:
    """As ``late_blocks`` for uniform blocks, from the queries and keys of the kept blocks alone, a few rows at once."""
    assert isinstance(plan.q_sizes, int)
    assert isinstance(plan.kv_sizes, int)
    batch, heads = q_BHND.shape[:2]
    on = plan.blocks.dense().expand(batch, heads, -1, -1).flatten(0, 2)
    q_there = torch.ones(batch, heads, plan.q_len, 1, dtype=torch.bool)
    k_there = torch.ones(batch, heads, plan.kv_len, 1, dtype=torch.bool)
    if key_valid_BN is not None:
        k_there &= key_valid_BN[:, None, :, None]
    q, q_there = (_in_blocks(x, plan.q_order, plan.q_sizes) for x in (q_BHND, q_there))
    k, k_there = (_in_blocks(x, plan.kv_order, plan.kv_sizes) for x in (k_BHND, k_there))
    whole = bool(q_there.all() & k_there.all())
    late = torch.zeros_like(on)
    counts = on.sum(1)
    for count in np.unique(counts.numpy()).tolist():
        if count <= PROTECTED + 1:  # the first is computed, and so are the last
            continue
        rows = (counts == count).nonzero()[:, 0]
        columns = on[rows].nonzero()[:, 1].view(-1, count)
        together = max(1, SCORES // (count * plan.q_sizes * plan.kv_sizes))
        for row, column in zip(rows.split(together), columns.split(together), strict=True):  # type: ignore[no-untyped-call]  # torch's
            own = (row // plan.blocks.shape[2] * plan.blocks.shape[3])[:, None] + column
            scores = product(q[row], k[own].flatten(1, 2).mT) * scale
            if not whole:
                there = q_there[row] & k_there[own].flatten(1, 2).mT
                scores = scores.masked_fill_(~there, -torch.inf)
            highest = scores.view(*scores.shape[:2], count, plan.kv_sizes).amax(-1)
            too_late = _too_late(plan, _rise(highest).amax(1))
            too_late[:, count - PROTECTED :] = False
            late[row] = late[row].scatter(1, column, too_late)
    return late.view(batch, heads, *plan.blocks.shape[2:])


def _rise(highest: Tensor) -> Tensor:
    """By how much a query's largest score in a block [..., T] exceeds those before: -inf for one without a score."""
    before = F.pad(highest.cummax(-1).values[..., :-1], (1, 0), value=-torch.inf)
    return (highest - before).masked_fill(highest == -torch.inf, -torch.inf)


def _too_late(plan: Plan, rise: Tensor) -> Tensor:
    assert plan.skip is not None
    return rise * math.log2(math.e) + plan.skip <= 0


def _in_blocks(x_BHND: Tensor, order: Tensor | None, size: int) -> Tensor:
    """Tokens [B, H, N, D] as blocks [B * H * T, size, D] in the plan's order; the last one is filled up with zeros."""
    if order is not None:
        x_BHND = torch.take_along_dim(x_BHND, order.view((1,) * (3 - order.ndim) + order.shape)[..., None], 2)
    padded = F.pad(x_BHND, (0, 0, 0, -x_BHND.shape[2] % size))
    return padded.reshape(-1, size, padded.shape[3])
