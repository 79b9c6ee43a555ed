"""A plan in the forms that foreign kernels read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from falloff.geometry import inverse
from falloff.plan import BlockMap, Plan


class Lists(NamedTuple):
    """Block ids of every row, packed to the left: ``counts`` int32 [B, H, T], ``ids`` int32 [B, H, T, width].

    Beyond a row's count its ids are 0: readable, and not to be read.
    """

    counts: Tensor
    ids: Tensor


def lists(blocks: BlockMap, width: int | None = None) -> Lists:
    """The rows of a map; as wide as the longest unless ``width`` is given."""
    count = blocks.start.diff()
    width = max(1, int(count.max())) if width is None else width
    place = torch.arange(blocks.pairs, device=count.device) - blocks.start[:-1].repeat_interleave(count)
    ids = torch.zeros(blocks.rows, width, dtype=torch.int32, device=count.device)
    ids[blocks.row_ids, place] = blocks.columns
    return Lists(count.to(torch.int32).view(blocks.shape[:3]), ids.view(*blocks.shape[:3], width))


def refined(plan: Plan, q_tile: int, kv_tile: int) -> BlockMap:
    """The plan's map on tiles that divide its blocks, which are uniform."""
    assert isinstance(plan.q_sizes, int)
    assert isinstance(plan.kv_sizes, int)
    if (plan.q_sizes, plan.kv_sizes) == (q_tile, kv_tile):
        return plan.blocks
    fine = plan.blocks.dense().repeat_interleave(plan.q_sizes // q_tile, 2)
    fine = fine.repeat_interleave(plan.kv_sizes // kv_tile, 3)
    return BlockMap.from_dense(fine[:, :, : -(-plan.q_len // q_tile), : -(-plan.kv_len // kv_tile)])


def in_order(x_BHND: Tensor, order: Tensor | None) -> Tensor:
    """Tokens in a plan's order, which may differ from head to head."""
    if order is None:
        return x_BHND
    if order.numel() == x_BHND.shape[2]:
        return x_BHND.index_select(2, order.flatten())
    return torch.take_along_dim(x_BHND, order[..., None], 2)


def from_order(x_BHND: Tensor, order: Tensor | None) -> Tensor:
    """Tokens from a plan's order back to the caller's."""
    return x_BHND if order is None else in_order(x_BHND, inverse(order))
