"""The summary part of a plan: blocks that a query skips answer it by their means.

A block of m keys whose mean is k_j, with v_j the mean of its values, stands for one key at logit
``scale q . k_j + log(m)``, as if each of its keys were the mean. It is computed apart from the blocks that a plan keeps
and merged with what a kernel made of those, unless that runs a plan's summary itself. Keys that a call drops are in no
mean and not counted.
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
"""Of one query and block: scores, weights and what is added. Of one query's channel: copies and results."""


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
    means = summarise(plan, k_BHND, v_BHND, key_valid_BN)
    batch, heads, length, head_dim = q_BHND.shape
    skipped, q_block = ~plan.blocks.dense(), plan.q_block_of()
    token_bytes = PAIR_BYTES * skipped.shape[3] + TOKEN_BYTES * head_dim
    chunk = max(1, WORKING_BYTES // token_bytes)
    results = []
    for group in groups_within(batch, heads, min(chunk, length) * token_bytes, WORKING_BYTES):
        bias = means.log_size[group][:, None].masked_fill(~of_group(skipped, group), -torch.inf)
        k, v = means.k[group], means.v[group]
        parts = []
        for tokens in (slice(start, start + chunk) for start in range(0, length, chunk)):
            rows = _rows(bias, of_group(q_block, group)[:, tokens])
            parts.append(_add(q_BHND[group][:, tokens], k, v, rows, scale, [x[group][:, tokens] for x in kept]))
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


def _rows(bias_HQT: Tensor, q_block_Hn: Tensor) -> Tensor:
    """What each query adds to its scores, [H, n, T], from what its block adds."""
    heads, blocks, _ = bias_HQT.shape
    place = q_block_Hn + blocks * torch.arange(heads, device=bias_HQT.device)[:, None]
    return bias_HQT.flatten(0, 1).index_select(0, place.flatten()).view(heads, -1, bias_HQT.shape[2])


def _add(q_HnD: Tensor, k_HTD: Tensor, v_HTD: Tensor, bias_HnT: Tensor, scale: float, kept: list[Tensor]) -> Branch:
    """Merge what a chunk of queries kept with the means that it skipped.

    ``bias_HnT``: log of a block's tokens, -inf where it is kept. Scores are made again for a gradient.
    """
    tensors = (q_HnD, k_HTD, v_HTD, bias_HnT, *kept)
    if differentiable(*tensors):
        again: Branch = checkpoint(_merged, scale, *tensors, use_reentrant=False, preserve_rng_state=False)
        return again
    return _merged(scale, *tensors)


def _merged(scale: float, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, out: Tensor, lse: Tensor) -> Branch:
    k, v = k.to(q.dtype), v.to(q.dtype)
    flash = q.device.type == "cpu" and not differentiable(q, k, v)
    answer, total = (_flash_means if flash else _means)(scale, q, k, v, bias)
    empty = (bias == -torch.inf).all(-1)
    answer, total = answer.masked_fill(empty[..., None], 0), total.masked_fill(empty, -torch.inf)
    return merge((out, lse), (answer, total))


def _means(scale: float, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Branch:
    scores = scale * product(q, k.mT) + bias
    scores = scores.masked_fill((bias == -torch.inf).all(-1, keepdim=True), 0)  # whose answer nobody sees
    total = scores.logsumexp(-1)
    weights = (scores - total[..., None]).exp()
    return product(weights.to(q.dtype), v), total


def _flash_means(scale: float, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Branch:
    """The same in one pass by PyTorch's operator for CPUs: with few means, passes over the scores would be the cost."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    q = q if q.stride(-1) == 1 else q.contiguous()  # it silently misreads other strides
    answer, total = flash(q[:, None], k[:, None], v[:, None], attn_mask=bias[:, None], scale=scale)
    return answer[:, 0], total[:, 0]


def _sums(x_ND: Tensor, lengths_T: Tensor) -> Tensor:
    """Sums over consecutive segments, [T, D]; in an order that is fixed, unlike that of adding by index on GPUs."""
    sums: Tensor = torch.segment_reduce(x_ND, "sum", lengths=lengths_T, unsafe=True)  # a plan's sizes add up
    return sums
