"""Where tokens are: grids, sequences and token orders.

A grid's tokens are numbered in raster order, ``k = (t * height + y) * width + x``. An order is an int64
permutation ``order_N`` with ``order[p]`` = raster index of the token at position ``p``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

OrderName = Literal["raster", "tile", "hilbert", "morton"]
ORDER_NAMES: tuple[OrderName, ...] = ("raster", "tile", "hilbert", "morton")


@dataclass(frozen=True)
class Grid:
    """Latent tokens after patchify, as (frames, height, width)."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise ValueError(f"a grid needs at least one token per axis, got {self}")

    @property
    def frame_tokens(self) -> int:
        return self.height * self.width

    @property
    def tokens(self) -> int:
        return self.frames * self.frame_tokens

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Sequence:
    """The tokens of one attention call: a grid, and ``text`` more tokens before or after it."""

    grid: Grid
    text: int = 0
    text_side: Literal["after", "before"] = "after"

    def __post_init__(self) -> None:
        if self.text < 0:
            raise ValueError(f"text must be at least 0 tokens, got {self.text}")
        if self.text_side not in ("after", "before"):
            raise ValueError(f"text_side must be 'after' or 'before', got {self.text_side!r}")

    @property
    def tokens(self) -> int:
        return self.grid.tokens + self.text

    @property
    def video_start(self) -> int:
        """Position of the grid's first token."""
        return self.text if self.text_side == "before" else 0

    def order(self, grid_order_N: Tensor | None) -> Tensor | None:
        """An order of the grid's tokens as an order of the whole sequence; text keeps its place."""
        if grid_order_N is None:
            return None
        start, end = self.video_start, self.video_start + self.grid.tokens
        return torch.cat([torch.arange(start), grid_order_N + start, torch.arange(end, self.tokens)])


def order(name: OrderName, grid: Grid, tile: tuple[int, int, int] = (1, 8, 8)) -> Tensor | None:
    """The named order of a grid's tokens, int64 [N]; ``None`` for raster.

    ``tile`` walks tiles of (frames, height, width) in raster order, tokens inside each in raster order; sizes
    that do not divide the grid leave smaller tiles at its far ends. ``hilbert`` and ``morton`` walk each frame
    along a generalised Hilbert or a Z curve, frame after frame.
    """
    if name == "raster":
        return None
    if name == "tile":
        return tile_order(grid, tile)
    if name == "hilbert":
        return _per_frame(grid, hilbert_order(grid.height, grid.width))
    if name == "morton":
        return _per_frame(grid, morton_order(grid.height, grid.width))
    raise ValueError(f"unknown token order {name!r}; choose one of {', '.join(ORDER_NAMES)}")


def inverse(order_N: Tensor) -> Tensor:
    """The inverse permutation along the last axis: ``inverse(o)[..., o[..., p]] = p``."""
    positions = torch.arange(order_N.shape[-1], device=order_N.device).expand_as(order_N)
    return torch.empty_like(order_N).scatter_(-1, order_N, positions)


def tile_order(grid: Grid, tile: tuple[int, int, int]) -> Tensor:
    """Tiles of (frames, height, width) in raster order, raster inside each: int64 [N]."""
    if min(tile) < 1:
        raise ValueError(f"a tile needs at least one token per axis, got {tile}")
    t, y, x = _coordinates(grid)
    across = (-(-grid.frames // tile[0]), -(-grid.height // tile[1]), -(-grid.width // tile[2]))
    number = ((t // tile[0]) * across[1] + y // tile[1]) * across[2] + x // tile[2]
    return torch.argsort(number, stable=True)


def morton_order(height: int, width: int) -> Tensor:
    """Tokens of one frame along a Z curve (bits of y and x interleaved), int64 [height * width]."""
    _, y, x = _coordinates(Grid(1, height, width))
    code = torch.zeros_like(y)
    for bit in range(max(height, width).bit_length()):
        code |= ((x >> bit) & 1) << (2 * bit) | ((y >> bit) & 1) << (2 * bit + 1)
    return torch.argsort(code, stable=True)


def hilbert_order(height: int, width: int) -> Tensor:
    """Tokens of one frame along a generalised Hilbert curve, int64 [height * width].

    Neighbours in the order are neighbours in the frame; an odd larger side with an even smaller one costs one
    diagonal step. The construction splits a rectangle, spanned by a major vector a and a minor vector b, in
    two halves along a when it is long, else in three parts that turn (Cerveny, "gilbert").
    """
    a, b = ((width, 0), (0, height)) if width >= height else ((0, height), (width, 0))
    points = list(_gilbert(0, 0, a, b))
    return torch.tensor([y * width + x for x, y in points], dtype=torch.int64)


def _gilbert(x: int, y: int, a: tuple[int, int], b: tuple[int, int]) -> Iterator[tuple[int, int]]:
    """Walk the rectangle at (x, y) with signed side vectors a (major) and b (minor)."""
    long, short = abs(a[0] + a[1]), abs(b[0] + b[1])
    step_a, step_b = (_sign(a[0]), _sign(a[1])), (_sign(b[0]), _sign(b[1]))
    if short == 1 or long == 1:
        count, (dx, dy) = (long, step_a) if short == 1 else (short, step_b)
        yield from ((x + i * dx, y + i * dy) for i in range(count))
        return
    half_a, half_b = (a[0] // 2, a[1] // 2), (b[0] // 2, b[1] // 2)
    half_long, half_short = abs(half_a[0] + half_a[1]), abs(half_b[0] + half_b[1])
    if 2 * long > 3 * short:
        if half_long % 2 and long > 2:  # an even first half ends on the side where the second starts
            half_a = (half_a[0] + step_a[0], half_a[1] + step_a[1])
        yield from _gilbert(x, y, half_a, b)
        yield from _gilbert(x + half_a[0], y + half_a[1], (a[0] - half_a[0], a[1] - half_a[1]), b)
        return
    if half_short % 2 and short > 2:
        half_b = (half_b[0] + step_b[0], half_b[1] + step_b[1])
    yield from _gilbert(x, y, half_b, half_a)
    yield from _gilbert(x + half_b[0], y + half_b[1], a, (b[0] - half_b[0], b[1] - half_b[1]))
    yield from _gilbert(
        x + a[0] - step_a[0] + half_b[0] - step_b[0],
        y + a[1] - step_a[1] + half_b[1] - step_b[1],
        (-half_b[0], -half_b[1]),
        (half_a[0] - a[0], half_a[1] - a[1]),
    )


def _sign(value: int) -> int:
    return (value > 0) - (value < 0)


def _coordinates(grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of every token, int64 [N] each."""
    k = torch.arange(grid.tokens)
    return k // grid.frame_tokens, k // grid.width % grid.height, k % grid.width


def _per_frame(grid: Grid, frame_order_S: Tensor) -> Tensor:
    starts_F = torch.arange(grid.frames) * grid.frame_tokens
    return (starts_F[:, None] + frame_order_S).flatten()
