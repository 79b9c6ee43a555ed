"""Means over blocks of tokens, in float32 at least; the last block of an axis may be shorter."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Grid


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
    if any(padding):
        x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
    t, y, z = ((length + more) // size for length, more, size in zip(shape, padding, tile, strict=True))
    x = x.reshape(batch, heads, t, tile[0], y, tile[1], z, tile[2], channels)
    sums = x.sum((3, 5, 7), dtype=torch.promote_types(x.dtype, torch.float32)).flatten(2, 4)
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
