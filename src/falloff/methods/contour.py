"""Contour: the pairs of tiles that their means answer worst are computed, and all others are answered by their means.

The grid is cut into compact tiles of (frames, height, width) tokens, like those of sliding tile attention. At a few
steps of a run, for some queries of every tile, attention to all keys is looked at as it is. With p_ik the weight of
key k and pbar_iJ the weight that each of the n_J keys of tile J would have were it the tile's mean, the error of
answering J by its mean is, over the queries i that stand for tile I,

    E_IJ = mean_i sum_{k in J} (p_ik - pbar_iJ)^2.

The budget belongs to the layer: over all heads and rows together those pairs are computed that spare most error for
their size, E_IJ / n_J, so that heads with broad attention, which means answer well, give to heads with sharp attention.
Maps serve until the next look. Text is always computed.

From AdaSpa (arXiv:2502.21079) it has the exact look at few steps, from SVG-EAR (arXiv:2603.08982) the error that
decides and the means, and from Sparse VideoGen2 neither its clusters nor their cost: tiles of video are alike enough.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from falloff.geometry import Grid, Sequence, tile_order
from falloff.kernels.groups import groups_within
from falloff.kernels.product import product
from falloff.methods.adaspa import check_every, due
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import NOT_FINITE, Tile, check_count, check_share, three, tile_plan
from falloff.methods.pinned import grid_tokens
from falloff.methods.pooling import tile_sizes
from falloff.plan import Plan
from falloff.schedule import Schedule

TILES: tuple[Tile, ...] = ((4, 4, 8), (2, 4, 8), (2, 4, 4))
"""What "auto" chooses from: the first with at least ``ENOUGH`` tiles."""
ENOUGH = 256
LOOK_BYTES = 128 << 20
"""Weights held at once during a look."""
WEIGHT_BYTES = 16
"""Of one query and key: its logit, weight and square, and whether the key is there."""


@dataclass(frozen=True, kw_only=True)
class Contour(Method):
    """Contour over any grid, images included, with text on either side.

    density: share of the tile pairs of a layer that is computed, above 0 and at most 1. A tile always sees itself.
    tile: tokens of a tile along (frames, height, width); "auto" takes the first of 4x4x8, 2x4x8 and 2x4x4 that makes
        256 tiles, else 2x4x4. Tiles at the far ends may be smaller.
    queries: of every tile that are looked at, evenly spaced; all of a smaller tile.
    look_every: steps from one look to the next, or their share of all steps when a float.
    summary: answer what is left out by means; without, pairs are computed by their mass alone.
    """

    name: ClassVar[str] = "contour"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "density": Span(0.03, 0.5, log=True),
        "tile": Choices(("auto", (4, 4, 4), (2, 4, 8), (2, 4, 4), (1, 8, 8))),
        "look_every": Choices((0.2, 0.4, 1.0)),
    }
    schedule: ClassVar[Schedule] = Schedule(dense_first=0.25, dense_layers=())

    density: float = 0.2
    tile: tuple[int, ...] | Literal["auto"] = "auto"
    queries: int = 8
    look_every: int | float = 0.4
    summary: bool = True

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if self.tile != "auto":
            object.__setattr__(self, "tile", three("tile", self.tile, "tokens"))
        check_count("queries", self.queries, "queries")
        check_every("look_every", self.look_every)

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        """The layer's last plan until a look is due; without a known step, that of the first call."""
        shape = (call.sequence, q_BHND.shape, q_BHND.device)
        kept = state.values if state.values.get("shape") == shape else {}
        if kept and not due(call, kept["step"], self.look_every):
            plan: Plan = kept["plan"]
            return plan
        tile = self.tile_of(call.sequence.grid)
        worth, sizes = self._look(call.sequence, tile, q_BHND, k_BHND)
        if not bool(worth.isfinite().all()):
            return NOT_FINITE
        plan = tile_plan(call.sequence, tile, best_pairs(worth, sizes, self.density))
        plan = dataclasses.replace(plan, summary=self.summary)
        state.values = {"shape": shape, "step": call.step, "plan": plan}
        return plan

    def tile_of(self, grid: Grid) -> Tile:
        """The tile that a grid is cut into."""
        if self.tile == "auto":
            return next((tile for tile in TILES if len(tile_sizes(grid, tile)) >= ENOUGH), TILES[-1])
        frames, height, width = self.tile
        return frames, height, width

    def _look(self, sequence: Sequence, tile: Tile, q_BHND: Tensor, k_BHND: Tensor) -> tuple[Tensor, Tensor]:
        """What computing each pair of tiles spares for its size, float32 [B, H, T, T], and the tiles' sizes [T]."""
        tiles = Tiles.of(sequence.grid, tile, q_BHND.device)
        q_video, k_video = (grid_tokens(x, sequence) for x in (q_BHND, k_BHND))
        batch, heads, _, head_dim = q_video.shape
        count, volume = tiles.token.shape
        exact = torch.promote_types(q_BHND.dtype, torch.float32)
        worth = torch.empty(batch, heads, count, count, dtype=exact, device=q_BHND.device)
        looked = tiles.spread(self.queries)
        row_bytes = WEIGHT_BYTES * looked.shape[1] * count * volume
        together = max(1, min(count, LOOK_BYTES // row_bytes))
        for group in groups_within(batch, heads, together * row_bytes, LOOK_BYTES):
            keys = k_video[group][:, tiles.token.flatten()]
            means = tiles.means(keys.to(exact))
            for first in range(0, count, together):
                rows = looked[first : first + together]
                q = q_video[group][:, rows.flatten()] * head_dim**-0.5
                logits = product(q, keys.mT).view(len(keys), -1, count, volume).masked_fill_(~tiles.real, -torch.inf)
                lse = logits.flatten(2).logsumexp(-1)[..., None]
                weights = logits.sub_(lse[..., None]).exp_()
                mass = weights.sum(-1)
                if self.summary:
                    at_mean = (product(q.to(exact), means.mT) - lse).exp()
                    value = weights.square_().sum(-1) - 2 * at_mean * mass + tiles.sizes * at_mean.square()
                else:
                    value = mass
                value = value.view(len(keys), *rows.shape, count).mean(2) / tiles.sizes
                worth[group][:, first : first + together] = value
        return worth, tiles.sizes


class Tiles(NamedTuple):
    """The grid's tokens by tile, int64 [T, V], padded to the volume of a whole tile with tokens of its own that
    ``real``, bool [T, V], tells apart; ``sizes`` int64 [T]."""

    token: Tensor
    real: Tensor
    sizes: Tensor

    @staticmethod
    def of(grid: Grid, tile: Tile, device: torch.device) -> Tiles:
        sizes = tile_sizes(grid, tile)
        place = torch.arange(int(sizes.max()))
        start = (sizes.cumsum(0) - sizes)[:, None]
        index = tile_order(grid, tile)[start + torch.minimum(place, sizes[:, None] - 1)]
        return Tiles(index.to(device), (place < sizes[:, None]).to(device), sizes.to(device))

    def spread(self, count: int) -> Tensor:
        """``count`` tokens of every tile, evenly spaced; tokens of smaller tiles come more than once: [T, count]."""
        count = min(count, self.token.shape[1])
        place = (2 * torch.arange(count, device=self.sizes.device) + 1) * self.sizes[:, None] // (2 * count)
        return self.token.gather(1, place)

    def means(self, x_HMD: Tensor) -> Tensor:
        """Means over tiles of tokens [H, T * V, D] in the order of ``token``: [H, T, D]."""
        x = x_HMD.view(len(x_HMD), *self.token.shape, -1) * self.real[..., None]
        return x.sum(2) / self.sizes[:, None]


def best_pairs(worth_BHTT: Tensor, sizes_T: Tensor, density: float) -> Tensor:
    """The worthiest pairs of tiles of all heads together, bool [B, H, T, T].

    As many as leave at most ``density`` of the token pairs computed; every tile sees itself in any case.
    """
    batch, heads, count = worth_BHTT.shape[:3]
    itself = torch.eye(count, dtype=torch.bool, device=worth_BHTT.device)
    order = worth_BHTT.masked_fill(itself, torch.inf).flatten(1).argsort(dim=1, descending=True, stable=True)
    pairs = (sizes_T[:, None] * sizes_T).expand(batch, heads, -1, -1).flatten(1).gather(1, order)
    budget = density * heads * int(sizes_T.sum()) ** 2
    on = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, pairs.cumsum(1) <= budget)
    return on.view(worth_BHTT.shape) | itself
