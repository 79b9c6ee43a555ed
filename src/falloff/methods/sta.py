"""Sliding tile attention, STA (arXiv:2502.04507): every tile of the grid sees a window of whole tiles around it.

The grid is cut into tiles of (frames, height, width) tokens, and a query in tile q of an axis of n tiles sees the
tiles k with

    |k - c| <= w // 2,     c = clamp(q, w // 2, n - 1 - w // 2),

along every axis: the window of w tiles moves inwards at the borders, so that all queries see equally many. An axis
of fewer tiles than that is seen whole, and an even w acts as w + 1. No block is computed in part, since windows move
by whole tiles. Any grid will do: tiles at its far ends may be smaller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from falloff.geometry import Grid
from falloff.methods.base import Call, Choices, Method, Span, State
from falloff.methods.layout import Tile, three, tile_plan, tiles_across
from falloff.plan import Plan

TILES: tuple[Tile, ...] = ((6, 8, 8), (4, 4, 4), (2, 4, 4), (2, 2, 2))
"""What "auto" chooses from; the first is the published one."""


@dataclass(frozen=True, kw_only=True)
class SlidingTile(Method):
    """Sliding tile attention over any frames x height x width, with text on either side, all of it seen.

    tile: tokens of a tile along (frames, height, width); "auto" takes the first of 6x8x8, 4x4x4, 2x4x4 and 2x2x2
        that leaves something out along every axis of more than one token, 2x2x2 where none does.
    window: tiles that a query sees along (frames, height, width), its own in the middle; at least 1 each.
    """

    name: ClassVar[str] = "sta"
    static: ClassVar[bool] = True
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "tile": Choices(("auto", (4, 4, 4), (2, 4, 4), (2, 2, 2))),
        "window": Choices(((1, 3, 3), (3, 1, 1), (3, 3, 3), (5, 3, 3), (3, 5, 5), (5, 5, 5))),
    }

    tile: tuple[int, ...] | Literal["auto"] = "auto"
    window: tuple[int, ...] = (3, 3, 3)

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", three("window", self.window, "tiles"))
        if self.tile != "auto":
            object.__setattr__(self, "tile", three("tile", self.tile, "tokens"))

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        grid = call.sequence.grid
        tile = self.tile_of(grid)
        return tile_plan(call.sequence, tile, self.tile_map(grid, tile)[None, None])

    def tile_of(self, grid: Grid) -> Tile:
        """The tile that a grid is cut into."""
        if self.tile != "auto":
            frames, height, width = self.tile
            return frames, height, width
        return next((tile for tile in TILES if self._leaves_out(grid, tile)), TILES[-1])

    def tile_map(self, grid: Grid, tile: Tile) -> Tensor:
        """Which tiles see which, bool [T, T], tiles in raster order."""
        t, y, x = (axis_window(n, w) for n, w in zip(tiles_across(grid, tile), self.window, strict=True))
        on = t[:, None, None, :, None, None] & y[:, None, None, :, None] & x[:, None, None, :]
        tiles = len(t) * len(y) * len(x)
        return on.reshape(tiles, tiles)

    def _leaves_out(self, grid: Grid, tile: Tile) -> bool:
        lengths = (grid.frames, grid.height, grid.width)
        axes = zip(lengths, tiles_across(grid, tile), self.window, strict=True)
        return all(length == 1 or n > w // 2 * 2 + 1 for length, n, w in axes)


def axis_window(tiles: int, window: int) -> Tensor:
    """Which tiles of an axis see which, bool [tiles, tiles]."""
    half = window // 2
    place = torch.arange(tiles)
    if tiles <= 2 * half:
        return torch.ones(tiles, tiles, dtype=torch.bool)
    centre = place.clamp(half, tiles - 1 - half)
    return (place - centre[:, None]).abs() <= half
