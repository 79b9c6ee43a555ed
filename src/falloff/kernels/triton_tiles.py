"""Tile sizes by architecture: data. Every row is compiled in the tests, which hold it to its chip's limits.

A program takes up to ``own`` tokens of its side, ``other`` tokens of the other side at a time. The compiler holds
``(stages + 1) // 2`` tiles of a list in flight, one hop for the list and one for what it names. None has been measured
yet (``benchmarks/tiles.py``).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

from falloff.plan import Sizes

Pass = Literal["forward", "dq", "dkv"]

HEAD_DIMS = (128, 256)
"""Largest head dim of each class: smaller heads run on the same tiles, with registers and memory to spare."""
TILES_OF_KEYS = (16, 32, 64)
"""Keys that tensor cores multiply at once, in a tile of the tables or a narrower one."""
RAGGED = 512
"""Mean block size from which large tiles suit blocks that do not fill them: a block's last is half empty on average."""


class Tile(NamedTuple):
    own: int
    other: int
    warps: int
    stages: int


# Warps beyond those that a tile's rows keep busy repeat the others' products, as the tests count: hence often four.
_SMALL: dict[tuple[Pass, int], tuple[Tile, ...]] = {
    ("forward", 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ("forward", 256): (Tile(64, 32, 4, 3),),
    ("dq", 128): (Tile(64, 64, 8, 3),),
    ("dq", 256): (Tile(32, 32, 4, 3),),
    ("dkv", 128): (Tile(64, 64, 8, 3),),
    ("dkv", 256): (Tile(32, 32, 4, 3),),
}
_WIDE: dict[tuple[Pass, int], tuple[Tile, ...]] = {
    ("dq", 256): (Tile(32, 64, 8, 3),),
    ("dkv", 256): (Tile(32, 64, 8, 3),),
}
_LARGE = {
    **_SMALL,
    **_WIDE,
    ("forward", 128): (Tile(128, 64, 8, 5), Tile(64, 64, 4, 5)),
    ("forward", 256): (Tile(128, 32, 8, 5), Tile(64, 32, 4, 3)),
    ("dq", 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
    ("dkv", 128): (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
}
_HOPPER = _LARGE | {("dkv", 128): (Tile(128, 32, 8, 3), Tile(64, 32, 4, 3))}  # with 64 queries registers spill
HALF: dict[int, dict[tuple[Pass, int], tuple[Tile, ...]]] = {
    80: _SMALL | _WIDE | {("forward", 128): (Tile(128, 64, 8, 5), Tile(64, 64, 4, 3))},
    89: _SMALL,
    90: _HOPPER,
    100: _LARGE,
    120: _SMALL | {("forward", 256): (Tile(64, 32, 4, 2),)},
}
"""Of 16-bit tensors: architecture -> (pass, head dims up to) -> tiles, the most efficient first."""
FULL = Tile(16, 16, 8, 2)
"""Of float32, everywhere: multiplied without tensor cores, which round it."""
LINEAR: dict[int, dict[int, Tile]] = {
    2: {128: Tile(64, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
    4: {128: Tile(16, 32, 8, 2), 256: Tile(16, 16, 8, 2)},
}
"""Of linear attention, everywhere: bytes of a number -> head dims up to -> tile, ``other`` the columns of a state."""


def tiles_for(arch: int, phase: Pass, head_dim: int, dtype: torch.dtype) -> tuple[Tile, ...]:
    """The tiles to choose from."""
    if dtype.itemsize == 4:
        return (FULL,)
    return HALF[arch][phase, head_class(head_dim)]


def linear_tile(head_dim: int, dtype: torch.dtype) -> Tile:
    return LINEAR[dtype.itemsize][head_class(head_dim)]


def head_class(head_dim: int) -> int:
    """The one of ``HEAD_DIMS`` whose tiles serve a head."""
    return next(most for most in HEAD_DIMS if head_dim <= most)


def tile_for(arch: int, phase: Pass, head_dim: int, dtype: torch.dtype, sizes: Sizes, mean: float) -> Tile:
    """The first tile that suits blocks of these sizes, of ``mean`` tokens on average; else the last."""
    tiles = tiles_for(arch, phase, head_dim, dtype)
    filled = (tile for tile in tiles if mean >= RAGGED or (isinstance(sizes, int) and sizes % tile.own == 0))
    return next(filled, tiles[-1])


def whole_blocks(arch: int, head_dim: int, dtype: torch.dtype, q_sizes: Sizes, kv_sizes: Sizes) -> Tile | None:
    """The smallest forward tile that holds a whole block of queries and just one block of keys.

    Such a tile can leave a block out. ``None`` where there is none: the chip's tiles are smaller, or a block of keys is
    no tile of theirs.
    """
    if not isinstance(q_sizes, int) or not isinstance(kv_sizes, int):
        return None
    holding = [tile for tile in tiles_for(arch, "forward", head_dim, dtype) if tile.own >= q_sizes]
    if not holding or kv_sizes not in TILES_OF_KEYS or kv_sizes > holding[-1].other:
        return None
    return holding[-1]._replace(other=kv_sizes)


def architecture(capability: tuple[int, int]) -> int:
    """The row of the table for a compute capability; an unknown chip gets the least shared memory of its kin."""
    major, minor = capability
    if major >= 12:
        return 120
    if major >= 10:
        return 100
    if major == 9:
        return 90
    return 80 if minor == 0 else 89
