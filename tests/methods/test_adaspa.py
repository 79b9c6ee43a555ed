"""AdaSpa: exact sums of attention, budgets of heads, and when it searches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff.geometry import Grid, Sequence
from falloff.methods import AdaSpa, Call, Dense, State, adaspa
from falloff.methods.adaspa import block_mass, head_sparsity
from falloff.plan import Plan

GRID = Grid(3, 8, 9)


def qkv(tokens: int, batch: int = 1, heads: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, 12, generator=generator) for _ in range(3))
    return 2 * q, 2 * k, v


def call(step: int | None = 0, steps: int | None = 50, sequence: Sequence | None = None) -> Call:
    return Call(sequence=sequence or Sequence(GRID), step=step, steps=steps)


def plan(method: AdaSpa, at: Call, tensors: tuple[Tensor, ...], state: State | None = None) -> Plan:
    made = method.plan(at, *tensors, State() if state is None else state)
    assert isinstance(made, Plan)
    return made


@pytest.mark.parametrize("search_bytes", [1, 60_000, adaspa.SEARCH_BYTES])
@pytest.mark.parametrize("tokens", [7, 48, 53])
def test_mass_is_the_sum_of_attention(monkeypatch: pytest.MonkeyPatch, tokens: int, search_bytes: int) -> None:
    monkeypatch.setattr(adaspa, "SEARCH_BYTES", search_bytes)
    q, k, _ = (x.double() for x in qkv(tokens, batch=2))
    mass, lse = block_mass(q, k, 8)
    scores = q @ k.mT * 12**-0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    weights = torch.nn.functional.pad(scores.softmax(-1), (0, -tokens % 8, 0, -tokens % 8))
    blocks = -(-tokens // 8)
    torch.testing.assert_close(mass, weights.view(2, 4, blocks, 8, blocks, 8).sum((3, 5)))
    assert mass.sum(-1)[..., : tokens // 8] == pytest.approx(8)


def test_search_with_the_lse_of_unchanged_queries_and_keys_is_the_same() -> None:
    q, k, _ = qkv(60)
    mass, lse = block_mass(q, k, 8)
    again, same = block_mass(q, k, 8, lse)
    torch.testing.assert_close(again, mass)
    assert same is lse


def test_a_stale_lse_scales_rows() -> None:
    q, k, _ = qkv(60)
    mass, lse = block_mass(q, k, 60)
    torch.testing.assert_close(block_mass(q, k, 60, lse - 1)[0], mass * torch.e)


@pytest.mark.parametrize(
    ("recall", "sparsity", "expected"),
    [
        ([0.95, 0.9, 0.7, 0.5], 0.8, [0.9, 0.9, 0.7, 0.7]),
        ([0.5, 0.95, 0.7, 0.6], 0.8, [0.7, 0.9, 0.8, 0.8]),
        ([0.95, 0.9, 0.85, 0.5], 0.8, [0.9, 0.9, 0.7, 0.7]),
        ([0.7, 0.6, 0.5, 0.4], 0.8, [0.8, 0.8, 0.8, 0.8]),
        ([0.95, 0.5], 0.2, [0.4, 0.0]),
        ([0.9], 0.8, [0.8]),
    ],
)
def test_good_heads_give_to_bad_ones(recall: list[float], sparsity: float, expected: list[float]) -> None:
    got = head_sparsity(torch.tensor([recall]), sparsity, 0.8)
    torch.testing.assert_close(got, torch.tensor([expected]))


def test_every_row_of_a_head_keeps_equally_many_of_its_heaviest() -> None:
    tensors = qkv(GRID.tokens)
    blocks = plan(AdaSpa(block=8, sparsity=0.6, recall=0.3), call(), tensors).blocks
    counts = blocks.start.diff().view(4, -1)
    assert (counts == counts[:, :1]).all()
    assert set(counts[:, 0].tolist()) == {5, 16}  # of 27: (1 + 0.6) / 2 and (3 * 0.6 - 1) / 2 are left out
    mass = block_mass(*tensors[:2], 8)[0]
    on = blocks.dense()
    assert (mass.masked_fill(~on, 9).amin(-1) >= mass.masked_fill(on, -1).amax(-1)).all()


@pytest.mark.parametrize("side", ["after", "before"])
def test_blocks_with_text_are_always_computed(side: str) -> None:
    sequence = Sequence(GRID, 5, side)
    made = plan(AdaSpa(block=8), call(sequence=sequence), qkv(sequence.tokens))
    words = torch.zeros(sequence.tokens, dtype=torch.bool)
    words[:5] = True
    words = words if side == "before" else words.flip(0)
    assert made.mask()[:, :, words].all()
    assert made.mask()[..., words].all()
    assert made.density < 0.6


def test_text_in_every_block_leaves_nothing_out() -> None:
    sequence = Sequence(Grid(1, 1, 5), 3)
    assert plan(AdaSpa(block=8), call(sequence=sequence), qkv(8)).density == 1


def test_it_searches_at_the_first_call_and_when_it_is_due() -> None:
    state, method = State(), AdaSpa(block=8)
    plans = {step: plan(method, call(step), qkv(GRID.tokens, seed=step), state) for step in range(10, 50)}
    assert all(plans[step] is plans[10] for step in range(10, 30))
    assert all(plans[step] is plans[30] for step in range(30, 50))
    assert plans[10] is not plans[30]
    every_third = AdaSpa(block=8, search_every=3)
    state = State()
    plans = {step: plan(every_third, call(step, None), qkv(GRID.tokens), state) for step in range(4)}
    assert plans[0] is plans[1] is plans[2] is not plans[3]


def test_without_a_step_the_first_plan_stays() -> None:
    for method in (AdaSpa(block=8), AdaSpa(block=8, search_every=1)):
        state = State()
        first = plan(method, call(None, None), qkv(GRID.tokens), state)
        assert plan(method, call(None, None), qkv(GRID.tokens, seed=1), state) is first


def test_another_size_searches_anew() -> None:
    state, other = State(), Grid(2, 8, 9)
    plan(AdaSpa(block=8), call(), qkv(GRID.tokens), state)
    assert plan(AdaSpa(block=8), call(1, sequence=Sequence(other)), qkv(other.tokens), state).q_len == other.tokens


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    tensors = qkv(GRID.tokens, batch=2)
    both = plan(AdaSpa(block=8), call(), tensors).mask()
    for b in range(2):
        assert torch.equal(plan(AdaSpa(block=8), call(), tuple(x[b : b + 1] for x in tensors)).mask()[0], both[b])


@pytest.mark.parametrize("which", [0, 1])
def test_what_is_not_finite_stays_dense(which: int) -> None:
    tensors, state = qkv(GRID.tokens), State()
    tensors[which][0, 1, 3, 4] = torch.inf
    assert isinstance(AdaSpa(block=8).plan(call(), *tensors, state), Dense)
    assert not state.values


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity = 1.0 is outside 0.0 to 1.0"),
        ({"sparsity": -0.1}, r"sparsity = -0.1"),
        ({"recall": 1.1}, r"recall = 1.1 is outside"),
        ({"block": 0}, r"block = 0 must be"),
        ({"search_every": 0}, r"search_every = 0 must be at least 1 step"),
        ({"search_every": 1.5}, r"search_every = 1.5"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AdaSpa(**settings)


def test_settings_round_trip() -> None:
    assert AdaSpa(**AdaSpa(block=32, search_every=7).settings()) == AdaSpa(block=32, search_every=7)
