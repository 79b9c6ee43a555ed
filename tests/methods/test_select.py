"""Selectors against the published rules' worked examples, and against one row at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from falloff.methods.select import cover, mass_ge, mass_le, near, topk, union

LADDER = torch.tensor([0.6, 0.25, 0.1, 0.05], dtype=torch.float64)
UNIFORM = torch.full((4,), 0.25, dtype=torch.float64)


def ids(kept: Tensor) -> list[int]:
    return kept.nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("share", "least", "expected"),
    [(0.3, 1, [1]), (0.6, 1, [1, 2]), (0.9, 1, [0, 1, 2]), (0.3, 2, [1, 2]), (1.0, 1, [0, 1, 2]), (0.0, 1, [1])],
)
@pytest.mark.parametrize("equal", [True, False])
def test_cover_on_the_published_clusters(share: float, least: int, expected: list[int], equal: bool) -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, -1.0]) + torch.tensor([1.0, 4.0, 8.0, 0.0]).log()
    mass = scores.softmax(-1)
    torch.testing.assert_close(mass, torch.tensor([0.2814, 0.4140, 0.3046, 0.0]), atol=5e-5, rtol=0)
    assert ids(cover(mass, share, least=least, equal=equal)) == expected


def test_rules_differ_at_equality_alone() -> None:
    halves = torch.tensor([0.25, 0.5, 0.125, 0.125])
    assert ids(cover(halves, 0.75)) == [0, 1, 2]  # the mass before rank 2 is the share itself
    assert ids(cover(halves, 0.75, equal=False)) == ids(mass_ge(halves, 0.75)) == [0, 1]
    assert ids(mass_le(halves, 0.75)) == [0, 1]
    assert ids(mass_le(halves, 0.7)) == [1]
    assert ids(mass_ge(halves, 0.7)) == [0, 1]


@pytest.mark.parametrize(
    ("mass", "share", "at_most", "at_least"),
    [(LADDER, 0.7, 1, 2), (LADDER, 0.9, 2, 3), (LADDER, 0.5, 1, 1), (UNIFORM, 0.6, 2, 3)],
)
def test_mass_rules_on_the_published_rows(mass: Tensor, share: float, at_most: int, at_least: int) -> None:
    assert ids(mass_le(mass, share)) == list(range(at_most))
    assert ids(mass_ge(mass, share)) == list(range(at_least))


@pytest.mark.parametrize(
    ("mass", "count", "share", "kept"),
    [(LADDER, 1, 0.7, 2), (LADDER, 3, 0.7, 3), (UNIFORM, 1, 0.6, 3), (LADDER, 1, 0.5, 1)],
)
def test_union_is_the_larger_of_both(mass: Tensor, count: int, share: float, kept: int) -> None:
    assert ids(union(mass.log(), count, share)) == list(range(kept))


def test_union_of_a_row_without_mass_is_its_count() -> None:
    assert ids(union(torch.full((4,), -torch.inf), 2, 0.9)) == [0, 1]


def test_union_ranks_blocks_whose_mass_is_too_small_to_tell() -> None:
    assert ids(union(torch.tensor([0.0, -300.0, -200.0]), 2, 0.5)) == [0, 2]


def test_a_share_of_one_keeps_every_block_with_mass_whatever_the_sum_rounds_to() -> None:
    mass = torch.cat([torch.ones(1), torch.full((1000,), 1e-9), torch.zeros(3)])
    for rule in (cover, mass_ge):
        assert ids(rule(mass, 1.0)) == list(range(1001))
        assert rule(mass.expand(2, -1), torch.tensor([[1.0], [0.5]])).sum(-1).tolist() == [1001, 1]


def test_a_long_flat_row_in_half_precision_is_summed_exactly() -> None:
    mass = (1.0 / torch.arange(1, 1001)).bfloat16()
    kept = cover(mass / mass.sum(), 0.9).sum()
    assert 440 < kept < 500  # a running sum in bfloat16 stalls at two thirds and keeps all


def test_shares_and_counts_of_every_head() -> None:
    mass = LADDER.expand(2, 1, 4)
    share, counts = torch.tensor([0.5, 0.9]).view(2, 1, 1), torch.tensor([1, 3]).view(2, 1, 1)
    assert cover(mass, share).sum(-1).flatten().tolist() == [1, 3]
    assert topk(mass, counts).sum(-1).flatten().tolist() == [1, 3]
    assert cover(mass, 0.0, least=counts).sum(-1).flatten().tolist() == [1, 3]


def test_topk_has_exactly_its_count_and_ties_to_the_lower_index() -> None:
    assert ids(topk(torch.tensor([1.0, 3.0, 1.0, 1.0]), 3)) == [0, 1, 2]
    assert ids(topk(torch.tensor([-torch.inf] * 4), 2)) == [0, 1]
    assert ids(topk(torch.tensor([-torch.inf, 0.0, -torch.inf]), 2)) == [0, 1]
    assert ids(topk(LADDER, 9)) == ids(topk(LADDER, torch.tensor([9]))) == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("equal", [True, False])
def test_cover_is_that_of_a_stable_sort(dtype: torch.dtype, equal: bool) -> None:
    """Ranks written out, with rows of many ties."""
    draw = torch.Generator().manual_seed(0)
    for levels in (3, 50, 10**6):
        mass = (torch.randint(levels, (2, 40, 90), generator=draw) / levels).to(dtype)
        for share, least in ((0.0, 1), (0.3, 4), (0.9, 1), (1.0, 2), (0.5, 200)):
            exact = mass.to(torch.promote_types(dtype, torch.float32))
            ordered, block = exact.sort(dim=-1, descending=True, stable=True)
            up_to = ordered.cumsum(-1)
            before = torch.cat([torch.zeros_like(up_to[..., :1]), up_to[..., :-1]], -1)
            bound = share * up_to[..., -1:]
            below = (before <= bound if equal else before < bound) | (share == 1)
            kept = (ordered > 0) & below | (torch.arange(90) < least)
            expected = torch.zeros_like(kept).scatter_(-1, block, kept)
            assert torch.equal(cover(mass, share, least=least, equal=equal), expected)


def test_near_keeps_what_lies_within_the_margin() -> None:
    scores = torch.tensor([[0.0, -1.0, -3.0], [5.0, 3.0, 2.0]])
    assert near(scores, 2.0).tolist() == [[True, True, False], [True, True, False]]
    assert near(scores, 0.0, torch.tensor([[1.0], [3.0]])).tolist() == [[False] * 3, [True, True, False]]


ROWS = st.lists(st.sampled_from([0.0, 1.0, 1.0, 2.0, 5.0]), min_size=1, max_size=9).filter(any)


def brute_cover(mass: list[float], share: float, least: int, equal: bool) -> list[int]:
    kept, before = [], 0.0
    for rank, block in enumerate(sorted(range(len(mass)), key=lambda j: -mass[j])):
        bound = share * sum(mass)
        below = before <= bound if equal else before < bound
        if (below and mass[block] > 0) or rank < least:
            kept.append(block)
        before += mass[block]
    return sorted(kept)


@settings(deadline=None, max_examples=200)
@given(mass=ROWS, share=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), least=st.integers(1, 4), equal=st.booleans())
def test_cover_equals_one_block_at_a_time(mass: list[float], share: float, least: int, equal: bool) -> None:
    row = torch.tensor(mass, dtype=torch.float64)
    assert ids(cover(row, share, least=least, equal=equal)) == brute_cover(mass, share, least, equal)


@settings(deadline=None, max_examples=100)
@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=5, max_size=5), min_size=2, max_size=4), k=st.integers(1, 5))
@pytest.mark.parametrize(
    "rule", [lambda x, k: topk(x, k), lambda x, k: cover(x + 1, k / 5), lambda x, k: mass_le(x + 1, k / 5)]
)
def test_rows_are_independent_and_adding_rows_changes_none(
    rule: Callable[[Tensor, int], Tensor], rows: list[list[int]], k: int
) -> None:
    scores = torch.tensor(rows, dtype=torch.float64)
    together = rule(scores, k)
    assert torch.equal(together, torch.stack([rule(row, k) for row in scores]))
    assert bool(together.any(-1).all())
