"""Sparse VideoGen2: the selection's written-out cases, its state, and text that is never left out."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from falloff.geometry import Grid, Sequence
from falloff.kernels import run
from falloff.methods import SVG2, Call, Dense, State
from falloff.methods.ear import error_per_pair, spend
from falloff.methods.select import cover
from falloff.methods.svg2 import estimated_mass
from falloff.plan import Plan, dense_plan

GRID = Grid(3, 7, 8)


def qkv(tokens: int, batch: int = 1, heads: int = 2, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, dim, generator=generator) for _ in range(3))
    return 2 * q, 2 * k, v


def plan(method: SVG2, sequence: Sequence, tensors: tuple[Tensor, ...], state: State | None = None) -> Plan:
    made = method.plan(Call(sequence=sequence), *tensors, State() if state is None else state)
    assert isinstance(made, Plan)
    return made


SMALL = SVG2(q_clusters=6, k_clusters=20, mass=0.5, min_share=0.0, span=0)


def test_mass_of_written_out_clusters() -> None:
    q = torch.tensor([[[1.0]]])
    k = torch.tensor([[[2.0], [1.0], [0.0], [-1.0]]])
    sizes = torch.tensor([[1, 4, 8, 0]])
    mass = estimated_mass(q, k, sizes)
    torch.testing.assert_close(mass, torch.tensor([[[0.2814, 0.4140, 0.3046, 0.0]]]), rtol=0, atol=1e-4)
    for share, least, kept in (
        (0.3, 1, {1}),
        (0.6, 1, {1, 2}),
        (0.9, 1, {0, 1, 2}),
        (0.3, 2, {1, 2}),
        (1.0, 1, {0, 1, 2}),
        (0.0, 1, {1}),
    ):
        assert set(cover(mass, share, least=least)[0, 0].nonzero()[:, 0].tolist()) == kept, share


def test_exact_centroids_keep_at_least_the_mass_asked_for() -> None:
    """Tokens of a cluster that are all equal make the estimate the attention itself."""
    generator = torch.Generator().manual_seed(1)
    grid = Grid(1, 4, 20)
    q, k = (torch.randn(1, 2, n, 8, generator=generator) for n in (5, 10))
    q, k = q.repeat_interleave(16, 2), k.repeat_interleave(8, 2)
    shuffle = torch.randperm(80, generator=generator)
    q, k = q[:, :, shuffle], k[:, :, shuffle]
    weights = (q @ k.mT * 8**-0.5).softmax(-1)
    for mass in (0.5, 0.8, 0.95):
        made = plan(SVG2(q_clusters=80, k_clusters=80, mass=mass, min_share=0.0), Sequence(grid), (q, k, k))
        kept = (weights * made.mask()).sum(-1)
        assert (kept >= mass).all()
        assert made.density < 1


def test_every_head_has_its_own_order_and_sizes() -> None:
    tensors = qkv(GRID.tokens)
    made = plan(SMALL, Sequence(GRID), tensors)
    assert made.q_order is not None
    assert made.q_order.shape == (1, 2, GRID.tokens)
    assert not torch.equal(made.q_order[0, 0], made.q_order[0, 1])
    assert made.blocks.shape == (1, 2, 6, 20)
    assert 0 < made.density < 1


def test_more_mass_and_a_larger_share_compute_more() -> None:
    tensors, sequence = qkv(GRID.tokens), Sequence(GRID)
    masks = [plan(dataclasses.replace(SMALL, mass=m), sequence, tensors).mask() for m in (0.2, 0.5, 0.9, 1.0)]
    assert all((less <= more).all() for less, more in itertools.pairwise(masks))
    assert masks[0].sum() < masks[1].sum() < masks[2].sum()
    assert masks[3].all()
    floor = plan(dataclasses.replace(SMALL, mass=0.0, min_share=0.35), sequence, tensors)
    assert (floor.blocks.start.diff() == 7).all()


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("text", [1, 9])
def test_text_keeps_its_place_and_is_always_computed(side: str, text: int) -> None:
    sequence = Sequence(GRID, text, side)
    tensors = qkv(sequence.tokens)
    made = plan(SMALL, sequence, tensors)
    mask = made.mask()
    words = torch.zeros(sequence.tokens, dtype=torch.bool)
    words[:text] = True
    words = words if side == "before" else words.flip(0)
    assert mask[:, :, words].all()
    assert mask[:, :, :, words].all()
    without = plan(SMALL, Sequence(GRID), tuple(x[:, :, ~words] for x in tensors))
    assert torch.equal(mask[:, :, ~words][:, :, :, ~words], without.mask())


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    tensors, sequence = qkv(GRID.tokens, batch=2), Sequence(GRID)
    both = plan(SMALL, sequence, tensors).mask()
    for b in range(2):
        assert torch.equal(plan(SMALL, sequence, tuple(x[b : b + 1] for x in tensors)).mask()[0], both[b])


def test_centroids_are_carried_over() -> None:
    sequence, state = Sequence(GRID), State()
    one_by_one = dataclasses.replace(SMALL, first_iterations=1, iterations=1)
    tensors = qkv(GRID.tokens)
    plans = [plan(one_by_one, sequence, tensors, state) for _ in range(4)]
    at_once = plan(dataclasses.replace(SMALL, first_iterations=4), sequence, tensors)
    assert torch.equal(plans[3].mask(), at_once.mask())
    assert not torch.equal(plans[0].mask(), at_once.mask())


def test_another_size_starts_anew() -> None:
    state = State()
    plan(SMALL, Sequence(GRID), qkv(GRID.tokens), state)
    other = Grid(2, 7, 8)
    tensors = qkv(other.tokens, seed=5)
    made = plan(SMALL, Sequence(other), tensors, state)
    assert torch.equal(made.mask(), plan(SMALL, Sequence(other), tensors).mask())


def test_a_plan_serves_its_span() -> None:
    method, state, sequence = dataclasses.replace(SMALL, span=2), State(), Sequence(GRID)
    plans = [plan(method, sequence, qkv(GRID.tokens, seed=n), state) for n in range(5)]
    assert plans[0] is plans[1] is plans[2]
    assert plans[3] is plans[4]
    assert plans[3] is not plans[2]
    assert "plan" in state.values
    plan(method, sequence, qkv(GRID.tokens, seed=5), state)
    assert "plan" not in state.values  # its last use: nobody waits for it any more
    assert "plan" not in plan_state(SMALL, sequence)


def plan_state(method: SVG2, sequence: Sequence) -> dict[str, object]:
    state = State()
    plan(method, sequence, qkv(sequence.tokens), state)
    return state.values


def test_the_seed_and_the_stride_decide() -> None:
    tensors, sequence = qkv(GRID.tokens), Sequence(GRID)
    base = plan(SMALL, sequence, tensors).mask()
    assert torch.equal(plan(SMALL, sequence, tensors).mask(), base)
    for other in ({"seed": 1}, {"stride": 3}):
        assert not torch.equal(plan(dataclasses.replace(SMALL, **other), sequence, tensors).mask(), base)


def test_a_whole_mass_gives_dense_attention() -> None:
    q, k, v = qkv(GRID.tokens)
    made = plan(dataclasses.replace(SMALL, mass=1.0), Sequence(GRID), (q, k, v))
    torch.testing.assert_close(run(made, q, k, v), run(dense_plan(GRID.tokens, GRID.tokens), q, k, v))


def test_clusters_beat_blocks_of_the_same_density_where_tokens_are_alike() -> None:
    """Scattered groups that attend to themselves: what the permutation is for."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 8, (1, 2, GRID.tokens), generator=generator)
    centers = 3 * torch.randn(8, 16, generator=generator)
    q = centers[group] + 0.3 * torch.randn(1, 2, GRID.tokens, 16, generator=generator)
    weights = (q @ q.mT / 4).softmax(-1)
    made = plan(SVG2(q_clusters=24, k_clusters=24, min_share=0.0), Sequence(GRID), (q, q, q))
    assert made.density < 0.3
    assert (weights * made.mask()).sum(-1).mean() > 0.9


EAR = dataclasses.replace(SMALL, summary=True)


def test_error_is_what_means_lose() -> None:
    """Against the definition, one pair of clusters at a time."""
    generator = torch.Generator().manual_seed(0)
    q, keys = (torch.randn(2, n, 4, generator=generator, dtype=torch.float64) for n in (7, 30))
    sizes = torch.tensor([[10, 0, 1, 19], [5, 5, 20, 0]])
    error = error_per_pair(q, keys, sizes)
    for h in range(2):
        starts = sizes[h].cumsum(0) - sizes[h]
        for i in range(7):
            expected = []
            for start, size in zip(starts.tolist(), sizes[h].tolist(), strict=True):
                k = keys[h, start : start + size]
                weights = (k @ q[h, i] / 2).exp()
                at_mean = (k.mean(0) @ q[h, i] / 2).exp() if size else torch.tensor(0.0)
                expected.append((weights - at_mean).square().sum() / max(size, 1))
            shift = (2 * (keys[h] @ q[h, i] / 2).max()).exp()
            torch.testing.assert_close(error[h, i], torch.stack(expected) / shift)


def test_error_does_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = qkv(60, heads=3)
    sizes = torch.tensor([[20, 40]]).expand(3, -1)
    whole = error_per_pair(q[0], k[0], sizes)
    monkeypatch.setattr("falloff.methods.ear.WORKING_BYTES", 1)
    torch.testing.assert_close(error_per_pair(q[0], k[0], sizes), whole)


def test_budgets_are_spent_on_the_worthiest() -> None:
    worth, sizes = torch.tensor([[3.0, 9.0, 1.0, 7.0, 8.0]]), torch.tensor([[2, 3, 1, 4, 0]])
    for budget, kept in ((0, {1}), (3, {1}), (6, {1}), (7, {1, 3}), (9, {0, 1, 3}), (10, {0, 1, 2, 3})):
        on = spend(worth, sizes, torch.tensor([[budget]]))
        assert set(on[0].nonzero()[:, 0].tolist()) == kept, budget


def test_routing_spends_no_more_than_the_cover_and_loses_less() -> None:
    q, k, v = qkv(GRID.tokens, seed=3)
    covered = plan(SMALL, Sequence(GRID), (q, k, v))
    routed = plan(EAR, Sequence(GRID), (q, k, v))
    assert routed.summary
    assert not covered.summary
    row_tokens = [(x.kv_sizes_BHT()[:, :, None] * x.blocks.dense()).sum(-1) for x in (routed, covered)]
    alone = routed.blocks.dense().sum(-1) == 1  # the first is computed whatever it costs
    assert ((row_tokens[0] <= row_tokens[1]) | alone).all()
    dense = run(dense_plan(GRID.tokens, GRID.tokens), q, k, v)[0]
    lost = [float((run(x, q, k, v)[0] - dense).norm()) for x in (covered, dataclasses.replace(covered, summary=True))]
    assert float((run(routed, q, k, v)[0] - dense).norm()) < lost[1] < lost[0]


def test_equal_keys_of_a_cluster_make_it_dense_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 2, 60, 8, generator=generator)
    k, v = (torch.randn(1, 2, 10, 8, generator=generator).repeat_interleave(6, 2) for _ in range(2))
    k = 3 * k
    method = SVG2(q_clusters=5, k_clusters=60, mass=0.2, min_share=0.0, summary=True)
    made = plan(method, Sequence(Grid(1, 6, 10)), (q, k, v))
    assert made.density < 0.5
    torch.testing.assert_close(run(made, q, k, v)[0], run(dense_plan(60, 60), q, k, v)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_stays_dense(which: int) -> None:
    tensors, state = list(qkv(GRID.tokens)), State()
    plan(SMALL, Sequence(GRID), tuple(tensors), state)
    before = dict(state.values)
    tensors[which][0, 1, 3, 4] = torch.nan
    made = SMALL.plan(Call(sequence=Sequence(GRID)), *tensors, state)
    assert made == Dense("queries or keys are not finite")
    assert state.values == before


def test_no_gradient_flows_through_a_plan() -> None:
    tensors = tuple(x.requires_grad_() for x in qkv(GRID.tokens))
    state = State()
    plan(SMALL, Sequence(GRID), tensors, state)
    assert not state.values["q"].requires_grad


@pytest.mark.parametrize(
    ("tokens", "q_blocks", "k_blocks"), [(1, 1, 1), (16, 1, 1), (65, 2, 5), (4352, 68, 272), (118_800, 300, 1000)]
)
def test_automatic_clusters_follow_the_grid(tokens: int, q_blocks: int, k_blocks: int) -> None:
    call = Call(sequence=Sequence(Grid(1, 1, tokens)))
    assert (SVG2()._count("q_clusters", call), SVG2()._count("k_clusters", call)) == (q_blocks, k_blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mass": 1.5}, r"mass = 1.5 is outside 0.0 to 1.0"),
        ({"min_share": -0.1}, r"min_share = -0.1 is outside"),
        ({"q_clusters": 0}, r"q_clusters = 0 must be a number of clusters"),
        ({"k_clusters": 2.5}, r"k_clusters = 2.5 must be"),
        ({"k_clusters": "many"}, r'k_clusters = \'many\' must be .* or "auto"'),
        ({"first_iterations": 0}, r"first_iterations = 0 must be a whole number of at least 1"),
        ({"iterations": -1}, r"iterations = -1 must be a whole number of at least 0"),
        ({"stride": 0}, r"stride = 0"),
        ({"span": True}, r"span = True"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SVG2(**settings)


def test_more_clusters_than_tokens_are_an_error() -> None:
    with pytest.raises(ValueError, match=r"k_clusters = 200 is more than the grid's 168 tokens"):
        plan(SVG2(k_clusters=200), Sequence(GRID), qkv(GRID.tokens))


def test_settings_round_trip() -> None:
    assert SVG2(**SMALL.settings()) == SMALL
