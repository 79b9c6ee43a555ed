"""Sparse VideoGen (arXiv:2502.01776): some heads look around in space, others along time; each gets its own band.

Spatial heads see the tokens near them in raster order, temporal heads those near them in patch-major order, where a
place's tokens of all frames follow one another. Both bands have the half-width w that keeps a share s of all pairs,

    w = N (1 - sqrt(1 - s')),     s' = s - 2 text / N,

and both see the first frame, whatever their order, and text. Which band a head gets is tried on a few queries at every
call: the one whose output is nearer to dense attention's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falloff.geometry import Grid, Sequence
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import UniformBlocks, uniform_plan
from falloff.methods.routing import output_errors, route, sampled_queries
from falloff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class SVG1(Method):
    """Sparse VideoGen over grids of several frames, with text on either side.

    density: share of all pairs that band and text keep; the first frame comes on top. Legal: above 0 to 1.
    block: tokens a block; a block is on when its middle lies in the band.
    sink_frames: first frames seen by every query.
    rows: queries that a head's band is tried on; seed: of their choice.
    """

    name: ClassVar[str] = "svg1"
    needs_frames: ClassVar[bool] = True
    dial: ClassVar[str | None] = "density"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "density": Span(0.05, 0.6),
        "block": Choices((32, 64, 128)),
        "sink_frames": Span(0, 2),
    }

    density: float = 0.3
    block: int = 128
    sink_frames: int = 1
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.density <= 1.0:
            raise ValueError(f"density = {self.density} is outside 0.0 to 1.0, where 0.0 would leave nothing")
        for field, least in (("block", 1), ("sink_frames", 0), ("rows", 1), ("seed", 0)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{field} = {value!r} must be a whole number of at least {least}")

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        bands = self._bands(call.sequence, q_BHND.device, state)
        queries = sampled_queries(call.sequence, self.rows, self.seed).to(q_BHND.device)
        errors = output_errors(bands, call.sequence, q_BHND, k_BHND, v_BHND, queries)
        return route(bands, errors, state)

    def _bands(self, sequence: Sequence, device: torch.device, state: State) -> tuple[Plan, ...]:
        """The same two plans for every layer and step."""
        key = (self, sequence, device)
        if key not in state.shared:
            state.shared[key] = tuple(band.to(device) for band in (self.spatial(sequence), self.temporal(sequence)))
        bands: tuple[Plan, ...] = state.shared[key]
        return bands

    def width(self, sequence: Sequence) -> float:
        """Half-width of the bands in tokens."""
        share = max(0.0, self.density - 2 * sequence.text / sequence.tokens)
        return sequence.tokens * (1 - math.sqrt(1 - share))

    def spatial(self, sequence: Sequence) -> Plan:
        """The band in raster order."""
        places = torch.arange(sequence.grid.tokens)
        return self._band(sequence, None, None, places, places)

    def temporal(self, sequence: Sequence) -> Plan:
        """The band in patch-major order; keys of the first frames come before all others, to be blocks of their own."""
        grid = sequence.grid
        order = patch_major(grid)
        first = order < min(self.sink_frames, grid.frames) * grid.frame_tokens
        places = torch.arange(grid.tokens)
        sink = order[first].sort(stable=True)
        kv_order = torch.cat([sink.values, order[~first]])
        kv_places = torch.cat([places[first][sink.indices], places[~first]])
        return self._band(sequence, order, kv_order, places, kv_places)

    def _band(
        self, sequence: Sequence, q_order: Tensor | None, kv_order: Tensor | None, q_places: Tensor, kv_places: Tensor
    ) -> Plan:
        """A band in tokens' places along a line [N], given in the order of queries and of keys."""
        blocks = UniformBlocks(sequence, self.block)
        q_middle, kv_middle = (_block_means(places, blocks) for places in (q_places, kv_places))
        distance = (q_middle[:, None] - kv_middle).abs()
        if len(kv_middle):
            nearest = distance.amin(1, keepdim=True)
            on = distance <= nearest.clamp(min=self.width(sequence))
            on[:, self._sinks(blocks)] = True
        else:  # text touches every block
            on = torch.ones(distance.shape, dtype=torch.bool)
        orders = {"q_order": sequence.order(q_order), "kv_order": sequence.order(kv_order)}
        return uniform_plan(blocks, blocks, on[None, None], **orders)

    def _sinks(self, blocks: UniformBlocks) -> slice:
        """Key blocks with tokens of the first frames, which lead in both orders."""
        sequence = blocks.sequence
        tokens = min(self.sink_frames, sequence.grid.frames) * sequence.grid.frame_tokens
        return slice(0, max(0, -(-(sequence.video_start + tokens - blocks.tokens.start) // self.block)))


def patch_major(grid: Grid) -> Tensor:
    """Tokens place by place, those of all frames at a place following one another: int64 [N]."""
    return torch.arange(grid.tokens).view(grid.frames, grid.frame_tokens).T.flatten()


def _block_means(places: Tensor, blocks: UniformBlocks) -> Tensor:
    """Mean place of the tokens of every block that holds video alone."""
    start = blocks.sequence.video_start
    inside = places[blocks.tokens.start - start : blocks.tokens.stop - start].double()
    block = torch.arange(len(inside)) // blocks.size
    return torch.bincount(block, weights=inside) / torch.bincount(block)
