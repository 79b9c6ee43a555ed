"""Block and tile means against one block at a time."""

from __future__ import annotations

import pytest
import torch

from falloff.geometry import Grid, tile_order
from falloff.methods.pooling import block_means, tile_means, tile_sizes


def tokens(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(2, 3, count, 4, dtype=dtype, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("count", "block"), [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_block_means_count_the_tail_by_its_own_tokens(count: int, block: int) -> None:
    x = tokens(count)
    expected = torch.stack([part.mean(2) for part in x.split(block, 2)], 2)
    torch.testing.assert_close(block_means(x, block), expected)


@pytest.mark.parametrize(("grid", "tile"), [((4, 4, 4), (2, 2, 4)), ((3, 5, 7), (2, 3, 4)), ((1, 3, 2), (4, 8, 8))])
def test_tile_means_follow_the_tile_order(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    space = Grid(*grid)
    x = tokens(space.tokens)
    sizes = tile_sizes(space, tile)
    assert int(sizes.sum()) == space.tokens
    in_order = x[:, :, tile_order(space, tile)]
    expected = torch.stack([part.mean(2) for part in in_order.split(sizes.tolist(), 2)], 2)
    torch.testing.assert_close(tile_means(x, space, tile), expected)


def test_half_precision_is_summed_in_float32() -> None:
    x = torch.full((1, 1, 4096, 1), 0.1, dtype=torch.bfloat16)
    value = float(x[0, 0, 0, 0])
    assert block_means(x, 4096).item() == pytest.approx(value, rel=1e-5)
    assert tile_means(x, Grid(16, 16, 16), (16, 16, 16)).item() == pytest.approx(value, rel=1e-5)
