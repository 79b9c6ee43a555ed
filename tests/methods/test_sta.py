"""Sliding tiles against the published windows and counts, and against one pair of tokens at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falloff import Grid, Plan, Sequence, plan_for
from falloff.kernels import run
from falloff.methods import SlidingTile, get
from falloff.methods.sta import axis_window


@pytest.mark.parametrize(
    ("tiles", "window", "seen"),
    [
        (5, 3, [[0, 1, 2], [0, 1, 2], [1, 2, 3], [2, 3, 4], [2, 3, 4]]),
        (3, 1, [[0], [1], [2]]),
        (2, 3, [[0, 1]] * 2),
        (3, 3, [[0, 1, 2]] * 3),
        (4, 9, [[0, 1, 2, 3]] * 4),
    ],
)
def test_windows_move_inwards_at_the_borders(tiles: int, window: int, seen: list[list[int]]) -> None:
    assert [row.nonzero()[:, 0].tolist() for row in axis_window(tiles, window)] == seen


def test_even_windows_act_as_the_next_odd_one() -> None:
    assert torch.equal(axis_window(6, 2), axis_window(6, 3))
    assert axis_window(6, 4).sum(1).tolist() == [5] * 6
    assert axis_window(4, 4).all()


@pytest.mark.parametrize(("window", "sparsity"), [((3, 3, 3), 91.0), ((5, 5, 5), 58.33), ((5, 3, 5), 75.0)])
def test_published_sparsity(window: tuple[int, int, int], sparsity: float) -> None:
    plan = plan_for(SlidingTile(tile=(6, 8, 8), window=window), Sequence(Grid(30, 48, 80)))
    assert 100 * (1 - plan.density) == pytest.approx(sparsity, abs=0.005)
    assert plan.q_sizes == 384


def token_mask(method: SlidingTile, tokens: Sequence) -> torch.Tensor:
    """Pair by pair, from the definition: bool [N, N]."""
    grid, tile = tokens.grid, method.tile_of(tokens.grid)
    k = torch.arange(grid.tokens)
    places = (k // grid.frame_tokens, k // grid.width % grid.height, k % grid.width)
    seen = torch.ones(grid.tokens, grid.tokens, dtype=torch.bool)
    lengths = (grid.frames, grid.height, grid.width)
    for place, length, size, window in zip(places, lengths, tile, method.window, strict=True):
        half, last, at = window // 2, -(-length // size) - 1, place // size
        centre = at.clamp(min=half).clamp(max=max(last - half, 0))
        seen &= ((at - centre[:, None]).abs() <= half) | (last < 2 * half)
    whole = torch.ones(tokens.tokens, tokens.tokens, dtype=torch.bool)
    video = slice(tokens.video_start, tokens.video_start + grid.tokens)
    whole[video, video] = seen
    return whole


SIDES = st.sampled_from(["after", "before"])


@settings(deadline=None, max_examples=60)
@given(
    grid=st.builds(Grid, st.integers(1, 6), st.integers(1, 7), st.integers(1, 8)),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)) | st.just("auto"),
    window=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    text=st.integers(0, 9),
    side=SIDES,
)
def test_any_grid_sees_its_windows_and_all_text(
    grid: Grid, tile: tuple[int, int, int] | str, window: tuple[int, int, int], text: int, side: str
) -> None:
    method, tokens = SlidingTile(tile=tile, window=window), Sequence(grid, text, side)
    assert torch.equal(plan_for(method, tokens).mask()[0, 0], token_mask(method, tokens))


def test_a_window_over_everything_is_full_attention() -> None:
    tokens = Sequence(Grid(3, 5, 7), 4)
    plan = plan_for(SlidingTile(tile=(2, 2, 4), window=(9, 9, 9)), tokens)
    q, k, v = torch.randn(3, 1, 2, tokens.tokens, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    valid = torch.ones(1, tokens.tokens, dtype=torch.bool)  # without it a whole map is PyTorch's, in any order
    torch.testing.assert_close(run(plan, q, k, v, key_valid=valid, impl="cpu")[0], out)


@pytest.mark.parametrize(
    ("grid", "tile"),
    [((21, 30, 52), (6, 8, 8)), ((17, 16, 16), (4, 4, 4)), ((1, 64, 64), (6, 8, 8)), ((2, 3, 3), (2, 2, 2))],
)
def test_auto_tiles_leave_something_out_where_any_can(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> None:
    assert SlidingTile().tile_of(Grid(*grid)) == tile


def test_text_after_whole_tiles_keeps_blocks_uniform() -> None:
    plan = plan_for(SlidingTile(tile=(2, 4, 4)), Sequence(Grid(8, 16, 16), 70))
    assert plan.q_sizes == 32
    assert plan.blocks.shape[2:] == (67, 67)
    ragged = plan_for(SlidingTile(tile=(2, 4, 4)), Sequence(Grid(8, 16, 17), 70))
    assert ragged.q_sizes.tolist()[-3:] == [32, 32, 6]


def test_long_videos_are_planned_without_token_masks() -> None:
    plan = plan_for(SlidingTile(), Sequence(Grid(128, 45, 80), 256))
    assert isinstance(plan, Plan)
    assert plan.density < 0.1


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"window": (3, 3)}, r"window = \(3, 3\) must be three numbers of tiles of at least 1"),
        ({"window": (3, 0, 3)}, r"window = \(3, 0, 3\) must be three"),
        ({"tile": (6, 8, True)}, r"tile = \(6, 8, True\) must be three numbers of tokens"),
        ({"tile": "big"}, r"tile = 'big' must be three"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SlidingTile(**setting)


def test_settings_come_back_from_lists_as_json_has_them() -> None:
    assert get("sta", tile=[6, 8, 8], window=[1, 3, 5]) == SlidingTile(tile=(6, 8, 8), window=(1, 3, 5))
