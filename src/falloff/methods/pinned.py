"""Plans over the grid's tokens, each head with an order and blocks of its own, and text as one more block."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Sequence
from falloff.plan import BlockMap, Plan


class Side(NamedTuple):
    """The grid's tokens as queries or as keys: ``order`` int64 [B, H, N], ``sizes`` of blocks int64 [B, H, T]."""

    order: Tensor
    sizes: Tensor


def grid_tokens(x_BHND: Tensor, sequence: Sequence) -> Tensor:
    """The grid's tokens of a sequence, without its text."""
    return x_BHND[:, :, sequence.video_start : sequence.video_start + sequence.grid.tokens]


def blocks_with_text(sequence: Sequence, on_BHQK: Tensor, q_sizes_BHT: Tensor, kv_sizes_BHT: Tensor) -> BlockMap:
    """The map of ``plan_with_text``, which takes less memory than booleans: text sees all and is seen by all.

    Blocks without tokens are left out, in ``on_BHQK`` itself too.
    """
    on = on_BHQK.logical_and_((q_sizes_BHT > 0)[..., :, None]).logical_and_((kv_sizes_BHT > 0)[..., None, :])
    if sequence.text:
        ends = (1, 0) if sequence.text_side == "before" else (0, 1)
        on = F.pad(on, (*ends, *ends), value=True)
    return BlockMap.from_dense(on)


def plan_with_text(sequence: Sequence, q: Side, kv: Side, blocks: BlockMap, *, summary: bool = False) -> Plan:
    """A plan over the whole sequence, of a map from ``blocks_with_text``. ``summary``: as for a plan."""
    if sequence.text:
        q, kv = _with_text(sequence, q), _with_text(sequence, kv)
    return Plan(
        q_len=sequence.tokens,
        kv_len=sequence.tokens,
        q_sizes=q.sizes,
        kv_sizes=kv.sizes,
        blocks=blocks,
        q_order=q.order,
        kv_order=kv.order,
        summary=summary,
    )


def _with_text(sequence: Sequence, side: Side) -> Side:
    lead, device = side.order.shape[:2], side.order.device
    first = 0 if sequence.text_side == "before" else sequence.grid.tokens
    text = torch.arange(first, first + sequence.text, device=device).expand(*lead, -1)
    size = torch.full((*lead, 1), sequence.text, device=device)
    orders, sizes = [side.order + sequence.video_start, text], [side.sizes, size]
    if sequence.text_side == "before":
        orders.reverse()
        sizes.reverse()
    return Side(torch.cat(orders, -1), torch.cat(sizes, -1))
