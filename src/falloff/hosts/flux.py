"""FLUX.1 and FLUX.2: attention over text, then the image's tokens in raster order, then those of reference images.

The image comes as a sequence already; ids (image, row, column, ...) beside it tell where each token is. Reference
images of the image's own size are further frames of the grid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from falloff.hosts import Given, Host, Size

_seen: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Grids by their ids: a pipeline hands over the same ids at every step, and reading them waits for the device."""


def _grid(given: Given, config: Any) -> Size | str:
    ids = given["img_ids"]
    if ids not in _seen:
        _seen[ids] = grid_of(ids)
    grid: Size | str = _seen[ids]
    return grid


def grid_of(ids: Tensor) -> Size | str:
    """The grid of images whose tokens have these ids, [S, image | row | column | ...], or one such for each sample."""
    rows = (ids[0] if ids.ndim == 3 else ids).detach().cpu()
    first = rows[rows[:, 0] == rows[0, 0]]
    height, width = (int(first[:, axis].max() - first[:, axis].min()) + 1 for axis in (1, 2))
    images, rest = divmod(len(rows), height * width)
    if rest:
        return f"the reference images are not of the image's size, {height}x{width} tokens"
    places = rows[:, 1:3].view(images, height * width, 2)
    raster = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    if not torch.equal(places - places[:, :1], raster.expand(images, -1, -1).to(places.dtype)):
        return f"the tokens are not {images} images of {height}x{width} tokens, row by row"
    return images, height, width


HOST = Host(
    family="FLUX",
    models=("FluxTransformer2DModel", "Flux2Transformer2DModel"),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=_grid,
    text_side="before",
    frames=False,
)
