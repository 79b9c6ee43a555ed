"""Shapes of real attention calls, by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from falloff.geometry import Grid, Sequence

EXPLICIT = "HEADS,DIM,FRAMESxHEIGHTxWIDTH or HEADS,DIM,TOKENS"
_EXPLICIT = re.compile(r"(\d+),(\d+),(?:(\d+)x(\d+)x(\d+)|(\d+))")


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The queries of one attention call [1, heads, tokens, head_dim].

    ``sequence``: where the tokens are; ``None`` when only their number is known. ``preset``: the published settings
    of the model that makes this call.
    """

    name: str
    heads: int
    head_dim: int
    tokens: int
    sequence: Sequence | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        if min(self.heads, self.head_dim, self.tokens) < 1:
            raise ValueError(f"shape {self.name!r} needs at least one head, one channel and one token")

    @property
    def grid(self) -> str:
        """As FRAMESxHEIGHTxWIDTH, and text; empty when unknown."""
        if self.sequence is None:
            return ""
        return f"{self.sequence.grid}" + (f" + {self.sequence.text} text" if self.sequence.text else "")


def on_grid(name: str, heads: int, head_dim: int, grid: Grid, text: int = 0, preset: str | None = None) -> Shape:
    """The shape of attention over a grid, and text after it."""
    sequence = Sequence(grid, text)
    return Shape(name=name, heads=heads, head_dim=head_dim, tokens=sequence.tokens, sequence=sequence, preset=preset)


SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        # 81 frames of 480 x 832; nobody has published settings for the small model, it takes its big brother's
        on_grid("wan1.3b-480p", 12, 128, Grid(21, 30, 52), preset="radial/wan2.1-14b"),
        on_grid("wan14b-480p", 40, 128, Grid(21, 30, 52), preset="radial/wan2.1-14b"),
        # 81 frames of 720 x 1280, and 321
        on_grid("wan14b-720p", 40, 128, Grid(21, 45, 80), preset="radial/wan2.1-14b"),
        on_grid("wan14b-720p-4x", 40, 128, Grid(81, 45, 80), preset="radial/wan2.1-14b-2x"),
        # 129 frames of 720 x 1280, and 509
        on_grid("hunyuan-720p", 24, 128, Grid(33, 45, 80), text=256, preset="radial/hunyuan"),
        on_grid("hunyuan-720p-4x", 24, 128, Grid(128, 45, 80), text=256, preset="radial/hunyuan-4x"),
    )
}


def shape_of(text: str, known: Mapping[str, Shape] = SHAPES) -> Shape:
    """A known shape by its name, or an explicit one. Raises ``ValueError`` with what is legal."""
    if text in known:
        return known[text]
    found = _EXPLICIT.fullmatch(text)
    if found is None:
        raise ValueError(f"unknown shape {text!r}; choose one of {', '.join(known)}, or {EXPLICIT}")
    heads, head_dim, *sides = (int(number) for number in found.groups() if number is not None)
    if len(sides) == 1:
        return Shape(name=text, heads=heads, head_dim=head_dim, tokens=sides[0])
    return on_grid(text, heads, head_dim, Grid(*sides))
