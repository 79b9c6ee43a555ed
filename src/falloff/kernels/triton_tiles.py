"""Tile sizes by architecture: data. Every row is compiled in the tests, which hold it to its chip's limits.

A program takes up to ``own`` tokens of its side, ``other`` tokens of the other side at a time.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from falloff.plan import Sizes

Pass = Literal["forward", "dq", "dkv"]


class Tile(NamedTuple):
    own: int
    other: int
    warps: int
    stages: int


TABLE: dict[tuple[int, Pass, int, int], tuple[Tile, ...]] = {
    (arch, p, width, byte): (Tile(64, 64, 4, 2),)
    for arch in (80, 89, 90, 100, 120)
    for p in ("forward", "dq", "dkv")
    for width in (64, 128, 256)
    for byte in (2, 4)
}
"""(architecture, pass, channels at most, bytes an element) -> tiles, the most efficient first; the last fits any plan."""


def tile_for(arch: int, phase: Pass, head_dim: int, dtype: torch.dtype, own: Sizes, other: Sizes) -> Tile:
    """The first tile that wastes nothing on blocks of these sizes, else the last."""
    width = next(width for width in (64, 128, 256) if head_dim <= width)
    tiles = TABLE[arch, phase, width, dtype.itemsize]
    return next((tile for tile in tiles if _fits(tile.own, own) and _divides(tile.other, other)), tiles[-1])


def architecture(capability: tuple[int, int]) -> int:
    """The row of the table for a compute capability; an unknown chip gets its family's least shared memory."""
    major, minor = capability
    if major >= 12:
        return 120
    if major >= 10:
        return 100
    if major == 9:
        return 90
    return 80 if minor == 0 else 89


def _fits(tile: int, sizes: Sizes) -> bool:
    """Whether blocks fill tiles. A varying block's last tile is half empty on average, so it should take several."""
    if isinstance(sizes, int):
        return sizes % tile == 0
    return True


def _divides(tile: int, sizes: Sizes) -> bool:
    """Whether tiles are filled from whole blocks; varying ones are packed, which fills any tile."""
    return not isinstance(sizes, int) or sizes % tile == 0
