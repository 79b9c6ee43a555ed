"""Orders: permutations, the rules of a group, and what they are for."""

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falloff.decoding.order import ORDER_NAMES, Locality, OrderName, make_orders
from falloff.decoding.sizes import PUBLISHED, cosine_sizes, group_sizes

ALL_NEAR = Locality(proximity=1.0, repulsion=0)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def neighbours(order: np.ndarray, sizes: tuple[int, ...], height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Group of every cell, and groups of its 8 neighbours (-1 outside): [H, W] and [8, H, W]."""
    group = np.empty(height * width, dtype=int)
    group[order] = np.repeat(np.arange(len(sizes)), sizes)
    around = np.pad(group.reshape(height, width), 1, constant_values=-1)
    shifts = [(a, b) for a in range(3) for b in range(3) if (a, b) != (1, 1)]
    return around[1:-1, 1:-1], np.stack([around[a : a + height, b : b + width] for a, b in shifts])


def shares(name: OrderName, repulsion: int = 2) -> tuple[float, float, float]:
    """Of 20 orders at 256 tokens in 20 steps: tokens with a known neighbour, with one in their own group, and of the
    last group with one in it."""
    sizes = group_sizes(256, 20)
    found = []
    for order in make_orders(name, 16, 16, sizes, 20, seed(0), locality=Locality(repulsion=repulsion)).numpy():
        own, others = neighbours(order, sizes, 16, 16)
        together = (others == own).any(axis=0)
        known = ((others < own) & (others >= 0)).any(axis=0)
        found.append((known.mean(), together.mean(), together[own == 19].mean()))
    known, together, last = np.mean(found, axis=0)
    return float(known), float(together), float(last)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_every_order_names_each_cell_once_and_known_cells_first(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(2, 9))
    sizes = cosine_sizes(height * width, data.draw(st.integers(2, height * width)))
    locality = Locality(
        proximity=data.draw(st.sampled_from([0.0, 1.0, 2.5, 7.0])), repulsion=data.draw(st.integers(0, 4))
    )
    known = torch.rand(height, width, generator=seed(data.draw(st.integers(0, 99)))) < data.draw(
        st.sampled_from([0.0, 0.5])
    )
    for name in ORDER_NAMES:
        orders = make_orders(name, height, width, sizes, 2, seed(1), locality=locality, known_HW=known)
        assert orders.shape == (2, height * width)
        assert torch.equal(orders.sort(dim=1).values, torch.arange(height * width).expand(2, -1))
        given_cells = known.flatten().nonzero()[:, 0]
        assert torch.equal(orders[:, : len(given_cells)].sort(dim=1).values, given_cells.expand(2, -1))


@pytest.mark.parametrize(("tokens", "steps"), [*PUBLISHED, (256, 64), (1024, 256)])
def test_every_published_table_makes_whole_orders(tokens: int, steps: int) -> None:
    side = round(tokens**0.5)
    for name in ("locality", "planned"):
        order = make_orders(name, side, side, group_sizes(tokens, steps), 1, seed(steps))[0]
        assert torch.equal(order.sort().values, torch.arange(tokens))


def test_a_generator_gives_the_same_orders_and_distinct_ones() -> None:
    first, again = (make_orders("locality", 8, 8, group_sizes(64, 8), 3, seed(5)) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])


def test_no_global_randomness_is_touched() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    make_orders("planned", 4, 4, group_sizes(16, 4), 2, seed(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_first_cell_is_uniform() -> None:
    firsts = make_orders("locality", 4, 4, (1, 15), 800, seed(0))[:, 0]
    counts = torch.bincount(firsts, minlength=16).double()
    assert float(((counts - 50) ** 2 / 50).sum()) < 37.7  # chi-squared of 15 degrees, 0.1 %


def test_published_order_keeps_close_to_what_is_known_and_apart_from_its_group() -> None:
    known, together, last = shares("locality")
    assert known == pytest.approx(0.96, abs=0.01)
    assert together == pytest.approx(0.10, abs=0.015)
    assert last == pytest.approx(0.84, abs=0.06)


def test_planned_order_has_no_neighbours_in_its_last_group() -> None:
    known, together, last = shares("planned")
    assert known > 0.93
    assert together < 0.06
    assert last == 0


def test_random_order_is_worse_on_both_counts() -> None:
    known, together, _ = shares("random")
    assert known == pytest.approx(0.86, abs=0.02)
    assert together == pytest.approx(0.34, abs=0.02)


def test_an_edge_of_the_centre_is_followed_by_the_opposite_one() -> None:
    for number in range(20):
        known = torch.zeros(3, 3, dtype=torch.bool)
        known[1, 1] = True
        order = make_orders(
            "locality", 3, 3, (1, 2, 6), 1, seed(number), locality=Locality(repulsion=1), known_HW=known
        )[0]
        assert order[0] == 4
        assert set(order[1:3].tolist()) in ({1, 7}, {3, 5})


def test_a_group_is_supported_and_apart_until_it_is_filled_up() -> None:
    """With so few tokens a group that rejection suffices, all rules hold for every pair."""
    sizes, rule = (1, 1, 2, 2, *[3] * 10, 220), Locality(proximity=1.0, repulsion=2)
    for order in make_orders("locality", 16, 16, sizes, 5, seed(2), locality=rule).numpy():
        cells = np.stack(np.divmod(order, 16), axis=1)
        ends = list(accumulate(sizes))
        for start, end in pairwise(ends[3:-1]):
            gap = np.abs(cells[start:end, None] - cells[None, start:end]).max(axis=2)
            assert (gap[~np.eye(end - start, dtype=bool)] > 2).all()
            distance = np.linalg.norm(cells[start:end, None] - cells[None, :start], axis=2)
            support = np.where(distance < 1.5, 1 / distance, 0).sum(axis=1)
            assert (support >= 1 - 1e-9).all()


def known_corner(*cells: tuple[int, int]) -> torch.Tensor:
    known = torch.zeros(6, 6, dtype=torch.bool)
    for cell in cells:
        known[cell] = True
    return known


def test_proximity_of_one_is_an_edge_or_two_corners() -> None:
    """Cell (2, 1) has the two known ones at its corners, all others near have one corner or an edge."""
    known = known_corner((1, 0), (1, 2))
    edges = {(0, 0), (2, 0), (1, 1), (0, 2), (2, 2), (1, 3)}
    taken = set()
    for number in range(60):
        order = make_orders("locality", 6, 6, (1, 1, 1, 33), 1, seed(number), known_HW=known)[0]
        taken.add(tuple(divmod(int(order[2]), 6)))
    assert taken == {(1, 1)}  # two edges weigh most
    taken.clear()
    for number in range(60):
        both = known.clone()
        both[1, 1] = True
        order = make_orders("locality", 6, 6, (1, 1, 1, 5, 28), 1, seed(number), known_HW=both, locality=ALL_NEAR)[0]
        taken |= {divmod(int(cell), 6) for cell in order[3:8]}
    assert {(0, 1), (2, 1)} <= taken <= edges | {(0, 1), (2, 1)}


def test_no_repulsion_takes_the_best_supported_whoever_is_near() -> None:
    known = known_corner((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (0, 5))
    for number in range(10):
        order = make_orders("locality", 6, 6, (1, 5, 6, 24), 1, seed(number), known_HW=known, locality=ALL_NEAR)[0]
        # the row below in full: its inner cells have three known neighbours, its ends two
        assert sorted(order[6:12].tolist()) == list(range(6, 12))


def test_unreachable_proximity_is_pure_farthest_point_sampling() -> None:
    order = make_orders("locality", 1, 9, (1, 3, 5), 1, seed(0), locality=Locality(proximity=7))[0].tolist()
    first, second = order[1], order[2]
    free = [c for c in range(9) if c not in order[:2]]
    assert abs(second - first) == max(abs(c - first) for c in [*free, second])


def test_halton_order_follows_the_sequence() -> None:
    # 1/2, 1/4, 3/4, 1/8 against 1/3, 2/3, 1/9, 4/9
    order = make_orders("halton", 4, 3, (1, 11), 1)[0].tolist()
    assert order[:4] == [2 * 3 + 1, 1 * 3 + 2, 3 * 3 + 0, 0 * 3 + 1]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown decoding order 'spiral'; choose one of locality, planned"):
        make_orders("spiral", 4, 4, (1, 15), 1)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="decodes 16 tokens, the group sizes sum to 15"):
        make_orders("raster", 4, 4, (1, 14), 1)
    with pytest.raises(ValueError, match=r"boolean \[4, 4\], got torch.bool \[4, 5\]"):
        make_orders("raster", 4, 4, (1, 15), 1, known_HW=torch.zeros(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"repulsion = -1 is negative"):
        Locality(repulsion=-1)
    with pytest.raises(ValueError, match=r"proximity = -0.5 is negative"):
        Locality(proximity=-0.5)
