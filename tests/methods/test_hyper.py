"""HyperAttention's buckets, order and blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from falloff import Grid, Plan, Sequence
from falloff.methods import Call, Dense, Hyper, State
from falloff.methods.hyper import gray_rank


def qk(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, tokens, 8, dtype=torch.float64, generator=generator).unbind()


def plan(method: Hyper, sequence: Sequence, q: Tensor, k: Tensor) -> Plan | Dense:
    return method.plan(Call(sequence=sequence), q, k, k, State())


def test_neighbouring_buckets_differ_in_one_sign() -> None:
    codes = torch.arange(1 << 16)
    ranks = gray_rank(codes)
    assert torch.equal(ranks ^ (ranks >> 1), codes)
    ordered = codes[ranks.argsort()].tolist()
    assert all((a ^ b).bit_count() == 1 for a, b in itertools.pairwise(ordered))


def test_every_block_sees_its_place_and_the_samples() -> None:
    q, k = qk(96)
    made = plan(Hyper(block=8), Sequence(Grid(1, 8, 12)), q, k)
    on = made.blocks.dense()[0, 0]
    assert on.shape == (12, 12)
    assert on.nonzero().tolist() == [[i, j] for i in range(12) for j in (0, 1 + (2 * i + 1) * 11 // 24)]
    samples = set(made.kv_order[0, 0, :8].tolist())
    assert samples == {6 + 12 * i for i in range(8)}
    assert torch.equal(made.kv_order[0, 0, :8], made.kv_order[0, 1, :8])


def test_tokens_of_one_direction_meet() -> None:
    generator = torch.Generator().manual_seed(3)
    directions = torch.randn(12, 8, dtype=torch.float64, generator=generator)
    kind = torch.arange(12).repeat(16)[torch.randperm(192, generator=generator)]
    x = (directions[kind] + 0.01 * torch.randn(192, 8, dtype=torch.float64, generator=generator))[None, None]
    made = plan(Hyper(block=16), Sequence(Grid(1, 12, 16)), x, x)
    same = kind[:, None] == kind
    found = made.mask()[0, 0]
    assert made.density == pytest.approx(2 / 12)
    assert float(found[same].double().mean()) > 0.5


def test_the_seed_alone_decides_and_lengths_do_not_matter() -> None:
    q, k = qk(96)
    sequence = Sequence(Grid(1, 8, 12))
    first, again, other = (plan(Hyper(block=8, seed=seed), sequence, q, k) for seed in (0, 0, 1))
    assert torch.equal(first.q_order, again.q_order)
    assert not torch.equal(first.q_order, other.q_order)
    scaled = plan(Hyper(block=8), sequence, 7 * q, 0.1 * k)
    assert torch.equal(first.q_order, scaled.q_order)
    assert torch.equal(first.kv_order, scaled.kv_order)


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize("block", [8, 50, 200])
def test_text_is_pinned_and_its_padding_changes_nothing(side: str, block: int) -> None:
    sequence = Sequence(Grid(3, 5, 7), 11, side)
    q, k = qk(116)
    made = plan(Hyper(block=block), sequence, q, k)
    text = slice(0, 11) if side == "before" else slice(105, None)
    q[:, :, text], k[:, :, text] = torch.nan, 1e9
    again = plan(Hyper(block=block), sequence, q, k)
    assert torch.equal(made.mask(), again.mask())
    assert bool(made.mask()[:, :, text].all())
    assert bool(made.mask()[:, :, :, text].all())
    assert (made.density == 1) == (block > 8)  # two blocks of 50 see both


def test_what_is_not_finite_stays_dense() -> None:
    q, k = qk(64)
    q[0, 1, 5, 2] = torch.nan
    assert plan(Hyper(), Sequence(Grid(1, 8, 8)), q, k) == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"projections": 0}, r"projections = 0 must be a number of signs"),
        ({"projections": 17}, r"projections = 17 must be at most 16"),
        ({"block": 0}, r"block = 0 must be a number of tokens"),
        ({"seed": -1}, r"seed = -1 must be a whole number"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Hyper(**setting)
