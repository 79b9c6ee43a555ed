"""Plans from a map over the video's blocks; text is seen by every query and sees every key.

Text keys may be padding, which says nothing about a video, so that predictors leave them out and pin them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Grid, Sequence, tile_order
from falloff.methods.pooling import tile_sizes
from falloff.plan import BlockMap, Plan

Tile = tuple[int, int, int]


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


def _as_uniform(sizes: Tensor, device: torch.device) -> int | Tensor:
    """One size where all blocks but a smaller last one have it: kernels read whole blocks faster than tokens."""
    size = int(sizes[0])
    uniform = bool((sizes[:-1] == size).all()) and int(sizes[-1]) <= size
    return size if uniform else sizes.to(device)
