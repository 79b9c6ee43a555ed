"""Sliding tile attention with a window of its own in every head (arXiv:2502.04507, sections 3.3 and 4).

Heads differ in how far they look, and do so alike for all prompts. ``falloff tune`` finds each head's window: that
whose output is nearest to full attention's for its cost, at several stages of a run. Stages are shares of a run's
steps, so that they fit any number of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from string import ascii_lowercase, digits
from typing import ClassVar, Literal

import torch
from torch import Tensor

from falloff.geometry import Grid, Sequence
from falloff.methods.base import Call, Method, State
from falloff.methods.layout import Tile, three, tile_plan
from falloff.methods.sta import SlidingTile
from falloff.plan import Plan

LETTERS = digits + ascii_lowercase
"""The number of a window as one letter."""
Choice = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class TileWindows(Method):
    """Sliding tiles over any frames x height x width, text seen by all, with windows chosen head by head.

    tile: tokens of a tile along (frames, height, width); "auto" takes what ``SlidingTile`` takes for the first window.
    windows: what heads choose from, tiles that a query sees along (frames, height, width); up to 36.
    until: where each stage of a run ends, as shares of its steps, ascending; the last is 1.
    heads: for every stage and layer one letter a head, the number of its window: 0 to 9, then a to z. Without any, all
        heads have the first window.
    """

    name: ClassVar[str] = "sta-windows"

    tile: tuple[int, ...] | Literal["auto"] = "auto"
    windows: tuple[tuple[int, ...], ...] = ((3, 3, 3),)
    until: tuple[float, ...] = (1.0,)
    heads: Choice = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(three("windows", window, "tiles") for window in self.windows))
        object.__setattr__(self, "until", tuple(self.until))
        object.__setattr__(self, "heads", tuple(tuple(layers) for layers in self.heads))
        if self.tile != "auto":
            object.__setattr__(self, "tile", three("tile", self.tile, "tokens"))
        if not 1 <= len(self.windows) <= len(LETTERS):
            raise ValueError(f"windows must be 1 to {len(LETTERS)}, got {len(self.windows)}")
        if not self.until or any(a >= b for a, b in pairwise((0.0, *self.until))) or self.until[-1] != 1:
            raise ValueError(f"until = {self.until} must rise from above 0 to 1, the end of the run")
        self._check_heads()

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        """The plan of a layer's heads at the run's stage; without a known step, at its last."""
        numbers = self._numbers(call, q_BHND.shape[1])
        key = (self.tile, self.windows, numbers, call.sequence, q_BHND.device)
        if key not in state.shared:
            state.shared[key] = self._plan(call.sequence, numbers).to(q_BHND.device)
        plan: Plan = state.shared[key]
        return plan

    def tile_of(self, grid: Grid) -> Tile:
        """The tile that a grid is cut into."""
        return SlidingTile(tile=self.tile, window=self.windows[0]).tile_of(grid)

    def stage(self, step: int | None, steps: int | None) -> int:
        """The stage of a step, 0 the first."""
        if step is None or not steps:
            return len(self.until) - 1
        return next(number for number, end in enumerate(self.until) if step < end * steps)

    def _numbers(self, call: Call, heads: int) -> tuple[int, ...]:
        """The window of each of the heads given; one for all where they have the same."""
        if not self.heads:
            return (0,)
        layers = self.heads[self.stage(call.step, call.steps)]
        if len(layers) != call.layers:
            raise ValueError(f"heads are for {len(layers)} layers, the model has {call.layers}")
        letters = layers[call.layer][call.first_head : call.first_head + heads]
        if len(letters) != heads:
            raise ValueError(
                f"heads of layer {call.layer} are {len(layers[call.layer])}, the model has more: "
                f"{heads} from number {call.first_head} on"
            )
        numbers = tuple(LETTERS.index(letter) for letter in letters)
        return numbers if len(set(numbers)) > 1 else numbers[:1]

    def _plan(self, sequence: Sequence, numbers: tuple[int, ...]) -> Plan:
        tile = self.tile_of(sequence.grid)
        maps = {
            number: SlidingTile(tile=tile, window=self.windows[number]).tile_map(sequence.grid, tile)
            for number in dict.fromkeys(numbers)
        }
        return tile_plan(sequence, tile, torch.stack([maps[number] for number in numbers])[None])

    def _check_heads(self) -> None:
        if self.heads and len(self.heads) != len(self.until):
            raise ValueError(f"heads are for {len(self.heads)} stages, until has {len(self.until)}")
        legal = LETTERS[: len(self.windows)]
        for letters in (letters for layers in self.heads for letters in layers):
            if not isinstance(letters, str) or not letters or not set(letters) <= set(legal):
                raise ValueError(f"heads = {letters!r} must be letters of {legal}, one for every head")
