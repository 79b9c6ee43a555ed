"""One side of a plan as blocks of one width: [H, N, D] to [H, T, width, D] and back, short ones padded by zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.kernels.groups import Group, groups_within, of_group
from falloff.plan import Plan, Sizes


@dataclass(frozen=True, eq=False)
class Blocks:
    """``count`` blocks of ``width`` slots for some tokens.

    ``place`` int64 [B|1, H|1, N]: the slot of every token; ``None`` where they fill the slots one after the other.
    """

    count: int
    width: int
    tokens: int
    place: Tensor | None

    def split(self, x_HND: Tensor, group: Group) -> Tensor:
        """The tokens of a few heads by blocks, [H, T, width, D]. Differentiable."""
        slots, (heads, _, channels) = self.count * self.width, x_HND.shape
        if self.place is None:
            padded = F.pad(x_HND, (0, 0, 0, slots - self.tokens))
        else:
            place = of_group(self.place, group)[..., None].expand(x_HND.shape)
            padded = x_HND.new_zeros(heads, slots, channels).scatter(1, place, x_HND)
        return padded.view(heads, self.count, self.width, channels)

    def join(self, x_HTWD: Tensor, group: Group) -> Tensor:
        """The inverse: the tokens in the given order, [H, N, D]. Differentiable."""
        flat = x_HTWD.flatten(1, 2)
        if self.place is None:
            return flat[:, : self.tokens]
        place = of_group(self.place, group)[..., None].expand(len(flat), -1, flat.shape[2])
        return flat.gather(1, place)


def q_blocks(plan: Plan) -> Blocks:
    """The blocks of a plan's queries."""
    return _blocks(plan.q_len, plan.q_sizes, plan.q_sizes_BHT(), plan.q_order)


def kv_blocks(plan: Plan) -> Blocks:
    """The blocks of a plan's keys and values."""
    return _blocks(plan.kv_len, plan.kv_sizes, plan.kv_sizes_BHT(), plan.kv_order)


def means(blocks: Blocks, x_BHND: Tensor, valid_BN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of every block the mean over its valid tokens [B, H, T, D], float32 at least, and how many these are [B, H, T].

    Zeros for a block without one. Differentiable.
    """
    batch, heads, length, channels = x_BHND.shape
    wide = torch.promote_types(x_BHND.dtype, torch.float32)
    results, counts = [], []
    for group in groups_within(batch, heads, 3 * wide.itemsize * length * channels):
        x = x_BHND[group].to(wide)
        valid = torch.ones(length, dtype=torch.bool, device=x.device) if valid_BN is None else valid_BN[group[0]]
        x = x.masked_fill(~valid[:, None], 0)  # 0 * NaN would leak otherwise
        count = blocks.split(valid.to(wide).expand(len(x), -1)[..., None], group).sum((2, 3))
        results.append(blocks.split(x, group).sum(2) / count.clamp(min=1)[..., None])
        counts.append(count)
    lead = (batch, heads, blocks.count)
    return torch.cat(results).view(*lead, channels), torch.cat(counts).view(lead)


def _blocks(length: int, sizes: Sizes, sizes_BHT: Tensor, order: Tensor | None) -> Blocks:
    count = sizes_BHT.shape[2]
    if isinstance(sizes, int):
        slot = torch.arange(length, device=sizes_BHT.device).expand(1, 1, -1)
        place = None if order is None else _of_tokens(slot, order)
        return Blocks(count, sizes, length, place)
    width = int(sizes_BHT.max())
    slot = _slots(sizes_BHT, width, length)
    return Blocks(count, width, length, slot if order is None else _of_tokens(slot, order))


def _slots(sizes_BHT: Tensor, width: int, length: int) -> Tensor:
    """The slot of every token in the plan's order, int64 [B|1, H|1, N]."""
    ends = sizes_BHT.cumsum(-1)
    position = torch.arange(length, device=ends.device).expand(*ends.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, position, right=True)
    return block * width + position - (ends - sizes_BHT).gather(-1, block)


def _of_tokens(slot: Tensor, order: Tensor) -> Tensor:
    """From slots by the plan's order to slots by the given order of tokens."""
    order = order if order.ndim == 3 else order.view(1, 1, -1)
    lead = [max(a, b) for a, b in zip(slot.shape[:2], order.shape[:2], strict=True)]
    slot, order = slot.expand(*lead, -1), order.expand(*lead, -1)
    return torch.empty_like(slot, memory_format=torch.contiguous_format).scatter_(-1, order, slot)
