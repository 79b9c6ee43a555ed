"""VSA's selection against one pair of tiles at a time, and the published counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from falloff import Grid, Plan, Sequence
from falloff.geometry import tile_order
from falloff.methods import VSA, Call, Dense, State
from falloff.methods.pooling import tile_sizes


def qk(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, tokens, 4, dtype=torch.float64, generator=generator).unbind()


def plan(method: VSA, sequence: Sequence, q: Tensor, k: Tensor, state: State | None = None) -> Plan | Dense:
    return method.plan(Call(sequence=sequence), q, k, k, state or State())


@pytest.mark.parametrize(("grid", "tiles"), [((21, 30, 52), 624), ((21, 45, 80), 1440), ((20, 48, 80), 1200)])
def test_published_numbers_of_tiles(grid: tuple[int, int, int], tiles: int) -> None:
    space = Grid(*grid)
    assert len(tile_sizes(space, VSA().tile_of(space))) == tiles


@pytest.mark.parametrize(
    ("sparsity", "tiles", "kept"), [(0.9, 360, 36), (0.9, 361, 37), (0.7, 10, 3), (0.0, 7, 7), (0.999, 20, 1)]
)
def test_kept_tiles_are_rounded_up(sparsity: float, tiles: int, kept: int) -> None:
    assert VSA(sparsity=sparsity).kept(tiles) == kept


@settings(deadline=None, max_examples=40)
@given(
    grid=st.builds(Grid, st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    sparsity=st.sampled_from([0.0, 0.4, 0.8]),
    text=st.integers(0, 5),
    side=st.sampled_from(["after", "before"]),
)
def test_the_map_follows_the_rule_one_row_at_a_time(
    grid: Grid, tile: tuple[int, int, int], sparsity: float, text: int, side: str
) -> None:
    sequence, method = Sequence(grid, text, side), VSA(sparsity=sparsity, tile=tile)
    q, k = qk(sequence.tokens)
    made = plan(method, sequence, q, k)
    assert isinstance(made, Plan)
    mask = made.mask()
    members = tile_order(grid, tile).split(tile_sizes(grid, tile).tolist())
    start = sequence.video_start
    q_means, k_means = (torch.stack([x[:, :, start + m].mean(2) for m in members], 2) for x in (q, k))
    scores = q_means @ k_means.mT
    expected = torch.ones_like(mask)
    for h in range(2):
        for i, rows in enumerate(members):
            best = sorted(range(len(members)), key=lambda j: -scores[0, h, i, j].item())[: method.kept(len(members))]
            seen = torch.zeros(sequence.tokens, dtype=torch.bool)
            for j in best:
                seen[start + members[j]] = True
            seen[: start if side == "before" else 0] = True
            seen[start + grid.tokens :] = True
            expected[0, h, start + rows] = seen
    assert torch.equal(mask, expected)


def test_padding_of_the_text_never_changes_the_map() -> None:
    sequence = Sequence(Grid(5, 6, 7), 9)
    q, k = qk(sequence.tokens)
    made = plan(VSA(), sequence, q, k)
    q[:, :, 210:], k[:, :, 210:] = torch.nan, 1e9
    again = plan(VSA(), sequence, q, k)
    assert torch.equal(made.blocks.columns, again.blocks.columns)
    assert made.density < 0.7


def test_token_order_is_made_once_for_a_sequence() -> None:
    state, sequence = State(), Sequence(Grid(5, 6, 7))
    q, k = qk(210)
    first, second = (plan(VSA(), sequence, x, y, state) for x, y in ((q, k), (k, q)))
    assert first.q_order is second.q_order
    other = Sequence(Grid(6, 5, 7))
    assert torch.equal(plan(VSA(), other, q, k, state).q_order, tile_order(other.grid, (4, 4, 4)))


def test_what_is_not_finite_stays_dense() -> None:
    q, k = qk(64)
    q[0, 1, 5, 2] = torch.inf
    assert plan(VSA(), Sequence(Grid(1, 8, 8)), q, k) == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity = 1.0 must be at least 0 and below 1"),
        ({"sparsity": -0.1}, r"sparsity = -0.1 must be"),
        ({"tile": (4, 4)}, r"tile = \(4, 4\) must be three numbers of tokens"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VSA(**setting)
