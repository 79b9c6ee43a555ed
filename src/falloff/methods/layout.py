"""Plans from a map over the video's blocks; text is seen by every query and sees every key.

Text keys may be padding, which says nothing about a video, so that predictors leave them out and pin them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Grid, Sequence, tile_order
from falloff.methods.base import Dense
from falloff.methods.pooling import tile_sizes
from falloff.plan import BlockMap, Plan

Tile = tuple[int, int, int]
Rule = Callable[[Tensor, Tensor], Tensor]
"""Queries and keys of the video [B, H, N, D] to a map over their blocks, bool [B, H, T, T]."""
NOT_FINITE = Dense("queries or keys are not finite")


@dataclass(frozen=True)
class UniformBlocks:
    """Blocks of ``size`` consecutive tokens of a sequence. Those that touch text are pinned."""

    sequence: Sequence
    size: int

    @property
    def count(self) -> int:
        return -(-self.sequence.tokens // self.size)

    @property
    def first(self) -> int:
        """The first block of video tokens alone."""
        return -(-self.sequence.video_start // self.size)

    @property
    def last(self) -> int:
        """One after the last block of video tokens alone; at most ``first`` where there is none."""
        if self.sequence.text and self.sequence.text_side == "after":
            return self.sequence.grid.tokens // self.size
        return self.count

    def video(self, x_BHND: Tensor) -> Tensor:
        """The tokens of the blocks that hold video alone."""
        return x_BHND[:, :, self.first * self.size : max(self.last, self.first) * self.size]

    def plan(self, on_BHTT: Tensor, *, order: Tensor | None = None, kv_order: Tensor | None = None) -> Plan:
        """The plan of a map over the blocks of ``video``, [B|1, H|1, T, T], all else on.

        ``order``, ``kv_order``: of the sequence's queries and keys, as for a plan.
        """
        first, after = self.first, self.count - max(self.last, self.first)
        on = F.pad(on_BHTT, (first, after, first, after), value=True)
        return Plan(
            q_len=self.sequence.tokens,
            kv_len=self.sequence.tokens,
            q_sizes=self.size,
            kv_sizes=self.size,
            blocks=BlockMap.from_dense(on),
            q_order=order,
            kv_order=kv_order,
        )


def predicted(sequence: Sequence, block: int, q_BHND: Tensor, k_BHND: Tensor, rule: Rule) -> Plan | Dense:
    """The plan whose map ``rule`` predicts from the video's own queries and keys, cut into blocks of ``block``."""
    blocks = UniformBlocks(sequence, block)
    q, k = blocks.video(q_BHND), blocks.video(k_BHND)
    if not finite(q, k):
        return NOT_FINITE
    if not q.shape[2]:  # text touches every block
        return blocks.plan(torch.ones(1, 1, 0, 0, dtype=torch.bool, device=q.device))
    return blocks.plan(rule(q, k))


def finite(*tensors: Tensor) -> bool:
    """Whether all numbers are; their sum is finite exactly then, unless it overflows float32."""
    sums = torch.stack([x.sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors])
    return bool(sums.isfinite().all())


def tile_plan(sequence: Sequence, tile: Tile, on_BHTT: Tensor) -> Plan:
    """The plan of a map over the grid's tiles in raster order, [B|1, H|1, T, T]; text is a block of its own, all on."""
    sizes = tile_sizes(sequence.grid, tile)
    if sequence.text:
        text, before = torch.tensor([sequence.text]), sequence.text_side == "before"
        sizes = torch.cat([text, sizes] if before else [sizes, text])
        on_BHTT = F.pad(on_BHTT, (1, 0, 1, 0) if before else (0, 1, 0, 1), value=True)
    token_order = sequence.order(tile_order(sequence.grid, tile))
    assert token_order is not None
    device = on_BHTT.device
    token_order = token_order.to(device)
    return Plan(
        q_len=sequence.tokens,
        kv_len=sequence.tokens,
        q_sizes=_as_uniform(sizes, device),
        kv_sizes=_as_uniform(sizes, device),
        blocks=BlockMap.from_dense(on_BHTT),
        q_order=token_order,
        kv_order=token_order,
    )


def tiles_across(grid: Grid, tile: Tile) -> Tile:
    """Tiles along each axis."""
    return -(-grid.frames // tile[0]), -(-grid.height // tile[1]), -(-grid.width // tile[2])


def check_block(block: object) -> None:
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        raise ValueError(f"block = {block!r} must be a number of tokens of at least 1")


def check_share(field: str, share: object) -> None:
    """Raise ``ValueError`` unless ``share`` lies above 0 and is at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise ValueError(f"{field} = {share!r} must be above 0 and at most 1")


def _as_uniform(sizes: Tensor, device: torch.device) -> int | Tensor:
    """One size where all blocks but a smaller last one have it: kernels read whole blocks faster than tokens."""
    size = int(sizes[0])
    uniform = bool((sizes[:-1] == size).all()) and int(sizes[-1]) <= size
    return size if uniform else sizes.to(device)
