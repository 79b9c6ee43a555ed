"""Orders are bijections with the shape they promise; sequences keep text in its place."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from falloff.geometry import ORDER_NAMES, Grid, Sequence, hilbert_order, inverse, morton_order, order, tile_order

GRIDS = st.builds(Grid, st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))


@given(grid=GRIDS, name=st.sampled_from(ORDER_NAMES))
def test_every_order_is_a_permutation(grid: Grid, name: str) -> None:
    made = order(name, grid, tile=(2, 3, 4))
    if made is None:
        assert name == "raster"
        return
    assert torch.equal(made.sort().values, torch.arange(grid.tokens))
    assert torch.equal(inverse(made)[made], torch.arange(grid.tokens))
    assert torch.equal(made[inverse(made)], torch.arange(grid.tokens))


@pytest.mark.parametrize(
    ("height", "width", "diagonal_steps"),
    [(45, 80, 0), (30, 52, 0), (27, 48, 0), (36, 64, 0), (30, 53, 1), (16, 16, 0), (1, 9, 0), (9, 1, 0)],
)
def test_hilbert_walks_to_neighbours(height: int, width: int, diagonal_steps: int) -> None:
    walk = hilbert_order(height, width)
    dy, dx = (walk // width).diff().abs(), (walk % width).diff().abs()
    assert int(torch.maximum(dy, dx).max()) == 1
    assert int((dy + dx > 1).sum()) == diagonal_steps
    assert torch.equal(walk.sort().values, torch.arange(height * width))


def test_morton_is_the_z_curve() -> None:
    assert morton_order(4, 4)[:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_tiles_are_consecutive() -> None:
    walk = tile_order(Grid(2, 4, 6), (2, 2, 3))
    assert walk[:12].tolist() == [0, 1, 2, 6, 7, 8, 24, 25, 26, 30, 31, 32]


@pytest.mark.parametrize("side", ["before", "after"])
def test_text_keeps_its_place_in_an_order(side: str) -> None:
    sequence = Sequence(Grid(1, 2, 3), text=4, text_side=side)
    made = sequence.order(torch.tensor([5, 4, 3, 2, 1, 0]))
    expected = [0, 1, 2, 3, 9, 8, 7, 6, 5, 4] if side == "before" else [5, 4, 3, 2, 1, 0, 6, 7, 8, 9]
    assert made is not None
    assert made.tolist() == expected


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid(0, 2, 2), "at least one token per axis"),
        (lambda: Sequence(Grid(1, 1, 1), text=-1), "text must be at least 0"),
        (lambda: Sequence(Grid(1, 1, 1), text_side="left"), "text_side must be"),
        (lambda: order("spiral", Grid(1, 2, 2)), "unknown token order 'spiral'; choose one of raster"),
        (lambda: tile_order(Grid(1, 2, 2), (0, 1, 1)), "at least one token per axis"),
    ],
)
def test_bad_geometry_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
