"""Means over blocks of tokens, in float32 at least; the last block of an axis may be shorter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Grid
from falloff.kernels.groups import groups_within

PADDED_BYTES = 8
"""Of one number of a head that is padded to whole tiles, about."""


def block_means(x_BHND: Tensor, block: int) -> Tensor:
    """Means over consecutive blocks of ``block`` tokens, [B, H, ceil(N / block), D]."""
    batch, heads, tokens, channels = x_BHND.shape
    whole = tokens // block * block
    exact = torch.promote_types(x_BHND.dtype, torch.float32)
    blocks = x_BHND[:, :, :whole].reshape(batch, heads, tokens // block, block, channels)
    means: Tensor = blocks.mean(3, dtype=exact)
    if whole == tokens:
        return means
    tail = x_BHND[:, :, whole:].mean(2, keepdim=True, dtype=exact)
    return torch.cat([means, tail], 2)


def tile_means(x_BHND: Tensor, grid: Grid, tile: tuple[int, int, int]) -> Tensor:
    """Means over tiles of (frames, height, width) of the grid's tokens in raster order, [B, H, tiles, D].

    Tiles are numbered in raster order; those at the far ends of the grid may be smaller.
    """
    shape = (grid.frames, grid.height, grid.width)
    padding = [-length % size for length, size in zip(shape, tile, strict=True)]
    batch, heads, _, channels = x_BHND.shape
    x = x_BHND.reshape(batch, heads, *shape, channels)
    t, y, z = ((length + more) // size for length, more, size in zip(shape, padding, tile, strict=True))
    exact = torch.promote_types(x.dtype, torch.float32)
    sums = torch.empty(batch, heads, t * y * z, channels, dtype=exact, device=x.device)
    for group in groups_within(batch, heads, PADDED_BYTES * x[0, 0].numel()):
        whole = F.pad(x[group], (0, 0, 0, padding[2], 0, padding[1], 0, padding[0])) if any(padding) else x[group]
        tiles = whole.reshape(-1, t, tile[0], y, tile[1], z, tile[2], channels)
        sums[group] = tiles.sum((2, 4, 6), dtype=exact).flatten(1, 3)
    means: Tensor = sums / tile_sizes(grid, tile).to(x.device)[:, None]
    return means


def tile_sizes(grid: Grid, tile: tuple[int, int, int]) -> Tensor:
    """Tokens of every tile in raster order, int64 [tiles]."""
    shape = (grid.frames, grid.height, grid.width)
    t, y, x = (cut(length, size) for length, size in zip(shape, tile, strict=True))
    return (t[:, None, None] * y[:, None] * x).flatten()


def cut(length: int, size: int) -> Tensor:
    """Lengths of pieces of ``size``, the last one shorter: int64 [pieces]."""
    return (length - torch.arange(0, length, size)).clamp(max=size)
