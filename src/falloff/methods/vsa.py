"""Video sparse attention, VSA (arXiv:2505.13389), its selection: tiles of the grid scored by their means.

The grid is cut into tiles of (frames, height, width) tokens. With means q_i and k_j over the tokens of a tile, every
row of tiles keeps the tiles of the

    max(1, ceil((1 - sparsity) T))

highest q_i . k_j, ties going to the lower tile. The trained method adds attention between the means themselves,
gated by a layer that models trained with it have; that branch is not here, only what any model can be given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from falloff.geometry import Grid, Sequence
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import NOT_FINITE, Tile, finite, grid_tile_order, three, tile_plan
from falloff.methods.pooling import tile_means
from falloff.methods.select import topk
from falloff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class VSA(Method):
    """The fine stage of video sparse attention over any frames x height x width; text sees all and is seen by all.

    sparsity: share of the tiles that a query leaves out, at least 0 and below 1.
    tile: tokens of a tile along (frames, height, width); "auto" takes 4x4x4, and 1x8x8 for grids of one frame. Tiles
        at the far ends of the grid may be smaller, and count as tiles all the same.
    """

    name: ClassVar[str] = "vsa"
    dial: ClassVar[str | None] = "sparsity"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "sparsity": Span(0.3, 0.95),
        "tile": Choices(("auto", (2, 4, 4), (2, 2, 4), (2, 2, 2))),
    }

    sparsity: float = 0.5
    tile: tuple[int, ...] | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity = {self.sparsity} must be at least 0 and below 1")
        if self.tile != "auto":
            object.__setattr__(self, "tile", three("tile", self.tile, "tokens"))

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        sequence, tile = call.sequence, self.tile_of(call.sequence.grid)
        video = slice(sequence.video_start, sequence.video_start + sequence.grid.tokens)
        q, k = q_BHND[:, :, video].detach(), k_BHND[:, :, video].detach()
        if not finite(q, k):
            return NOT_FINITE
        scores = tile_means(q, sequence.grid, tile) @ tile_means(k, sequence.grid, tile).mT
        on = topk(scores, self.kept(scores.shape[-1]))
        return tile_plan(sequence, tile, on, self._token_order(sequence, q.device, state))

    def tile_of(self, grid: Grid) -> Tile:
        """The tile that a grid is cut into."""
        if self.tile == "auto":
            return (1, 8, 8) if grid.frames == 1 else (4, 4, 4)
        frames, height, width = self.tile
        return frames, height, width

    def kept(self, tiles: int) -> int:
        """Tiles that every query sees, of ``tiles``."""
        share = (1 - self.sparsity) * tiles
        return max(1, math.ceil(share - 1e-9 * tiles))  # 1 - 0.7 is a little more than 0.3

    def _token_order(self, sequence: Sequence, device: torch.device, state: State) -> Tensor:
        """Made once as long as the sequence stays the same."""
        wanted = (sequence, device)
        if state.values.get("tiled") != wanted:
            state.values["tiled"] = wanted
            state.values["order"] = grid_tile_order(sequence, self.tile_of(sequence.grid), device)
        order: Tensor = state.values["order"]
        return order
