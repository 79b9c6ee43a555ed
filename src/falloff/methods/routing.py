"""Let every head take that of several plans whose output on a few queries comes nearest to dense attention."""

from __future__ import annotations

from collections.abc import Sequence as Several

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Sequence
from falloff.kernels.groups import groups_within
from falloff.kernels.product import product
from falloff.methods.base import Dense, State
from falloff.methods.layout import NOT_FINITE
from falloff.methods.pinned import grid_tokens
from falloff.plan import BlockMap, Plan, PlanError, Sizes

SCORE_BYTES = 16
"""Of one sampled query and key: its score, the score a plan leaves, its weight, and whether it is left."""


def sampled_queries(sequence: Sequence, count: int, seed: int = 0) -> Tensor:
    """Positions of grid tokens drawn without replacement, all of them where there are no more: int64 [R], ascending."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(sequence.grid.tokens, generator=generator)[:count]
    return drawn.sort().values + sequence.video_start


def output_errors(
    plans: Several[Plan], sequence: Sequence, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, queries_R: Tensor
) -> Tensor:
    """Energy of each plan's difference from dense attention's output over that of the output, [plans, B, H].

    Both over some queries. Only keys and values of the grid count: plans agree on text, whose keys may be padding.
    """
    batch, heads, _, head_dim = q_BHND.shape
    k, v = grid_tokens(k_BHND, sequence), grid_tokens(v_BHND, sequence)
    masks = [grid_tokens(plan.keys_seen(queries_R).transpose(2, 3), sequence).transpose(2, 3) for plan in plans]
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    errors = torch.empty(len(plans), batch, heads, dtype=exact, device=q_BHND.device)
    for group in groups_within(batch, heads, SCORE_BYTES * len(queries_R) * k.shape[2]):
        scores = product(q_BHND[group][:, queries_R], k[group].mT) * head_dim**-0.5
        dense = _answer(scores, v[group])
        energy = dense.square().sum((1, 2)).clamp(min=torch.finfo(exact).tiny)
        for number, mask in enumerate(masks):
            mask = mask.expand(batch, heads, -1, -1)[group]
            sparse = _answer(scores.masked_fill(~mask, -torch.inf), v[group])
            errors[number][group] = (sparse - dense).square().sum((1, 2)) / energy
    return errors


def route(plans: tuple[Plan, ...], errors_PBH: Tensor, state: State, tolerance: float = 0.0) -> Plan | Dense:
    """Every head's choice as one plan; the one of the call before where nothing has changed since.

    A head takes its sparsest plan among those whose error is at most ``tolerance`` above its least.
    """
    if not bool(errors_PBH.isfinite().all()):
        return NOT_FINITE
    good = errors_PBH <= errors_PBH.amin(0) + tolerance
    density = torch.tensor([plan.density for plan in plans], device=errors_PBH.device)
    choice = torch.where(good, density[:, None, None], 2.0).argmin(0)
    before = state.values
    if before.get("plans") == plans and torch.equal(before["choice"], choice):
        same: Plan = before["plan"]
        return same
    plan = merged(plans, choice)
    before.update(plans=plans, choice=choice, plan=plan)
    return plan


def merged(plans: Several[Plan], choice_BH: Tensor) -> Plan:
    """One plan in which every head has the map, order and blocks of the plan that ``choice_BH`` [B, H] names.

    Plans of fewer blocks get empty ones. Raises ``PlanError`` for other lengths, those with a summary, and with skip.
    """
    first = plans[0]
    for plan in plans:
        special = plan.summary or plan.partial or plan.skip is not None
        if (plan.q_len, plan.kv_len) != (first.q_len, first.kv_len) or special:
            raise PlanError(
                f"plans to choose from must be complete, without summary and skip, and all over {first.q_len} queries "
                f"and {first.kv_len} keys, got {plan.q_len} and {plan.kv_len}, summary={plan.summary}, "
                f"partial={plan.partial}, skip={plan.skip}"
            )
    q_blocks, kv_blocks = (max(plan.blocks.shape[axis] for plan in plans) for axis in (2, 3))
    maps = [
        F.pad(plan.blocks.dense(), (0, kv_blocks - plan.blocks.shape[3], 0, q_blocks - plan.blocks.shape[2]))
        for plan in plans
    ]
    return Plan(
        q_len=first.q_len,
        kv_len=first.kv_len,
        q_sizes=_sizes([p.q_sizes for p in plans], [p.q_sizes_BHT() for p in plans], q_blocks, choice_BH),
        kv_sizes=_sizes([p.kv_sizes for p in plans], [p.kv_sizes_BHT() for p in plans], kv_blocks, choice_BH),
        blocks=BlockMap.from_dense(_chosen(maps, choice_BH)),
        q_order=_orders([p.q_order for p in plans], first.q_len, choice_BH),
        kv_order=_orders([p.kv_order for p in plans], first.kv_len, choice_BH),
    )


def _answer(scores: Tensor, v: Tensor) -> Tensor:
    empty = (scores == -torch.inf).all(-1, keepdim=True)
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    return product(weights.to(v.dtype), v)


def _sizes(given: list[Sizes], sizes_BHT: list[Tensor], blocks: int, choice_BH: Tensor) -> Sizes:
    """One int where all have it, for kernels read whole blocks faster; else sizes for every head."""
    if all(isinstance(size, int) and size == given[0] for size in given):
        return given[0]
    return _chosen([F.pad(sizes, (0, blocks - sizes.shape[2])) for sizes in sizes_BHT], choice_BH)


def _orders(orders: list[Tensor | None], length: int, choice_BH: Tensor) -> Tensor | None:
    if all(order is None for order in orders):
        return None
    given = torch.arange(length, device=choice_BH.device)
    whole = [given if order is None else order for order in orders]
    return _chosen([order.view((1,) * (3 - order.ndim) + order.shape) for order in whole], choice_BH)


def _chosen(values: list[Tensor], choice_BH: Tensor) -> Tensor:
    """Of tensors [B|1, H|1, ...] of one shape the one that each head has chosen, [B, H, ...]."""
    rest = values[0].shape[2:]
    choice = choice_BH.view(*choice_BH.shape, *(1,) * len(rest))
    result = values[0].expand(*choice_BH.shape, *rest)
    for number, value in enumerate(values[1:], 1):
        result = torch.where(choice == number, value, result)
    return result.contiguous()
