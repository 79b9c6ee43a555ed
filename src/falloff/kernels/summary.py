"""The summary part of a plan: blocks that a query skips answer it by their means.

A block of m keys whose mean is k_j, with v_j the mean of its values, stands for one key at logit
``scale q . k_j + log(m)``, as if each of its keys were the mean. It is computed apart from the blocks that a plan keeps
and merged with what any kernel made of those. Keys that a call drops are in no mean and not counted.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from falloff.kernels.groups import groups_within, of_group
from falloff.kernels.merge import Branch, merge
from falloff.kernels.needs import differentiable
from falloff.kernels.product import product
from falloff.plan import Plan

WORKING_BYTES = 256 << 20
"""Held at once beside queries, keys, values and results."""
PAIR_BYTES, TOKEN_BYTES = 16, 24
"""Of one query and block: scores, weights and whether it is skipped. Of one query's channel: copies and results."""


class Summary(NamedTuple):
    """Of every key block: means of keys and of values [..., Tk, D], log of the tokens in it [..., Tk]."""

    k: Tensor
    v: Tensor
    log_size: Tensor


def with_summary(
    plan: Plan,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    scale: float,
    key_valid_BN: Tensor | None,
    kept: Branch,
) -> Branch:
    """The result over the kept blocks, merged with the means of the blocks that each query skips. Differentiable."""
    summary = summarise(plan, k_BHND, v_BHND, key_valid_BN)
    batch, heads, length, head_dim = q_BHND.shape
    skipped, q_block = ~plan.blocks.dense(), plan.q_block_of()
    token_bytes = PAIR_BYTES * skipped.shape[3] + TOKEN_BYTES * head_dim
    chunk = max(1, WORKING_BYTES // token_bytes)
    results = []
    for group in groups_within(batch, heads, min(chunk, length) * token_bytes, WORKING_BYTES):
        parts = []
        for tokens in (slice(start, start + chunk) for start in range(0, length, chunk)):
            q_block_Hn = of_group(q_block, group)[:, tokens, None]
            rows = of_group(skipped, group).gather(1, q_block_Hn.expand(-1, -1, skipped.shape[3]))
            means = Summary(*(x[group] for x in summary))
            parts.append(_add(q_BHND[group][:, tokens], rows, means, scale, [x[group][:, tokens] for x in kept]))
        results.append([torch.cat(part, 1) for part in zip(*parts, strict=True)])
    out, lse = (
        torch.cat(result).view(*kept[0].shape[:3], *result[0].shape[2:]) for result in zip(*results, strict=True)
    )
    return out, lse


def summarise(plan: Plan, k_BHND: Tensor, v_BHND: Tensor, key_valid_BN: Tensor | None) -> Summary:
    """The means of a plan's key blocks, in float32 at least; -inf and zeros for blocks without a token."""
    batch, heads, length, head_dim = k_BHND.shape
    sizes = plan.kv_sizes_BHT().expand(batch, heads, -1)
    order = None if plan.kv_order is None else plan.kv_order.expand(batch, heads, length)
    exact = torch.promote_types(k_BHND.dtype, torch.float32)
    means: list[tuple[Tensor, ...]] = []
    for group in groups_within(batch, heads, 4 * exact.itemsize * length * head_dim, WORKING_BYTES):
        lengths = sizes[group].flatten()
        valid = None if key_valid_BN is None else key_valid_BN[group[0]].expand(len(sizes[group]), -1)
        kv = torch.cat([k_BHND[group], v_BHND[group]], -1).to(exact)
        if order is not None:
            kv = kv.gather(1, order[group][..., None].expand(kv.shape))
            valid = None if valid is None else valid.gather(1, order[group])
        counts = lengths.to(exact)
        if valid is not None:
            kv = kv.masked_fill(~valid[..., None], 0)  # 0 * NaN would leak otherwise
            counts = _sums(valid.to(exact).flatten()[:, None], lengths)[:, 0]
        sums = _sums(kv.flatten(0, 1), lengths) / counts.clamp(min=1)[:, None]
        both = sums.view(len(sizes[group]), -1, 2 * head_dim)
        means.append((both[..., :head_dim], both[..., head_dim:], counts.log().view(both.shape[:2])))
    lead = (batch, heads, -1)
    k, v, log_size = (torch.cat(x) for x in zip(*means, strict=True))
    return Summary(k.view(*lead, head_dim), v.view(*lead, head_dim), log_size.view(lead))


def _add(q_HnD: Tensor, skipped_HnT: Tensor, means: Summary, scale: float, kept: list[Tensor]) -> Branch:
    """Merge what a chunk of queries kept with the means that it skipped; scores are made again for a gradient."""
    tensors = (q_HnD, skipped_HnT, *means, *kept)
    if differentiable(*tensors):
        again: Branch = checkpoint(_merged, scale, *tensors, use_reentrant=False, preserve_rng_state=False)
        return again
    return _merged(scale, *tensors)


def _merged(
    scale: float, q: Tensor, skipped: Tensor, k: Tensor, v: Tensor, log_size: Tensor, out: Tensor, lse: Tensor
) -> Branch:
    scores = scale * product(q, k.to(q.dtype).mT) + log_size[:, None]
    scores = scores.masked_fill(~skipped, -torch.inf)
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    scores = scores.masked_fill(empty, 0)
    total = scores.logsumexp(-1)
    weights = (scores - total[..., None]).exp().masked_fill(empty, 0)
    answer = product(weights.to(q.dtype), v.to(q.dtype))
    return merge((out, lse), (answer, total.masked_fill(empty[..., 0], -torch.inf)))


def _sums(x_ND: Tensor, lengths_T: Tensor) -> Tensor:
    """Sums over consecutive segments, [T, D]; in an order that is fixed, unlike that of adding by index on GPUs."""
    sums: Tensor = torch.segment_reduce(x_ND, "sum", lengths=lengths_T, unsafe=True)  # a plan's sizes add up
    return sums
