"""Leaving blocks out while computing: the published numbers, the bound on the error, and agreement with the rest."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import Case, cases, qkv, random_map, uniform_plan

from falloff.kernels import KernelError, UnsupportedError, run
from falloff.kernels.skip import attention_skipping
from falloff.plan import BlockMap, Plan


def one_row(logits: list[float], values: list[float], **settings: float) -> float:
    """The output of one query over keys of these base-2 logits, a block each."""
    plan = uniform_plan(torch.ones(1, len(logits), dtype=torch.bool), 1, len(logits), 1)
    q = torch.tensor([[[[1.0]]]], dtype=torch.float64)
    k, v = (torch.tensor(x, dtype=torch.float64).view(1, 1, -1, 1) for x in (logits, values))
    return attention_skipping(plan, q, k, v, scale=math.log(2), **settings).out.item()


@pytest.mark.parametrize(
    ("settings", "out"),
    [
        ({"margin": math.inf}, 2.00194742),
        ({"margin": 5.0, "protected": 0}, 2.0),
        ({"margin": 5.0, "protected": 2}, 2.00292398),
        ({"margin": 10.0, "protected": 0}, 2.0),
        ({"margin": 10.5, "protected": 0}, 2.00194742),
    ],
)
def test_published_row(settings: dict[str, float], out: float) -> None:
    assert one_row([10.0, 0.0, 0.0, 0.0], [2.0, 1.0, 3.0, 4.0], **settings) == pytest.approx(out, abs=5e-9)


def test_the_order_of_visits_matters() -> None:
    assert one_row([0.0, 10.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], margin=5.0, protected=0) == pytest.approx(1.99902439)


@settings(deadline=None, max_examples=30)
@given(case=cases())
def test_an_infinite_margin_is_the_plan_itself(case: Case) -> None:
    out, lse, skipped = attention_skipping(case.plan, case.q, case.k, case.v, margin=math.inf, key_valid=case.key_valid)
    expected, expected_lse = run(case.plan, case.q, case.k, case.v, key_valid=case.key_valid, impl="reference")
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)
    assert not skipped.any()


def test_what_is_computed_is_attention_over_it() -> None:
    plan = uniform_plan(random_map(0, 2, 5, 12, density=0.7), 37, 90, 8, partial=False)
    q, k, v = qkv(0, 1, 2, 37, 90, 4)
    out, lse, skipped = attention_skipping(plan, 12 * q, k, v, margin=1.0, protected=1)
    assert skipped.sum() > 10
    assert not (skipped & ~plan.blocks.dense()).any()
    left = uniform_plan(plan.blocks.dense() & ~skipped, 37, 90, 8)
    expected, expected_lse = run(left, 12 * q, k, v, impl="reference")
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)


@pytest.mark.parametrize("margin", [1.0, 4.0, 8.0])
def test_the_error_is_bounded_by_the_margin(margin: float) -> None:
    plan = uniform_plan(torch.ones(5, 12, dtype=torch.bool), 37, 90, 8)
    q, k, v = qkv(1, 1, 2, 37, 90, 4)
    q = 6 * q
    out, _, skipped = attention_skipping(plan, q, k, v, margin=margin, protected=0)
    assert skipped.any()
    exact = run(plan, q, k, v, impl="reference")[0]
    left_out = uniform_plan(skipped, 37, 90, 8).mask()
    spread = (v[:, :, None] - out[:, :, :, None]).abs().masked_fill(~left_out[..., None], 0).amax(3)
    bound = 2**-margin * left_out.sum(-1, keepdim=True) * spread
    assert bool(((out - exact).abs() <= bound + 1e-12).all())


def test_a_block_stays_for_one_query_that_needs_it() -> None:
    blocks = BlockMap.from_dense(torch.ones(1, 2, dtype=torch.bool))
    plan = Plan(q_len=2, kv_len=2, q_sizes=2, kv_sizes=1, blocks=blocks)
    one, other = torch.eye(2, dtype=torch.float64).mul(8).view(2, 1, 1, 1, 2)
    k = v = torch.eye(2, dtype=torch.float64).view(1, 1, 2, 2)
    skipped = [
        attention_skipping(plan, torch.cat(q, 2), k, v, margin=5.0, protected=0, scale=1.0).skipped.flatten().tolist()
        for q in ((one, one), (one, other))
    ]
    assert skipped == [[False, True], [False, False]]


def test_heads_may_have_margins_of_their_own() -> None:
    plan = uniform_plan(torch.ones(5, 12, dtype=torch.bool), 37, 90, 8)
    q, k, v = qkv(1, 2, 2, 37, 90, 4)
    skipped = attention_skipping(plan, 6 * q, k, v, margin=torch.tensor([1.0, math.inf])).skipped
    alone = attention_skipping(plan, 6 * q, k, v, margin=1.0).skipped
    assert torch.equal(skipped[:, 0], alone[:, 0])
    assert alone[:, 1].any()
    assert not skipped[:, 1].any()
    assert not alone[..., 0].any()
    assert not alone[..., -2:].any()


def test_dropped_keys_change_nothing_whatever_they_hold() -> None:
    plan = uniform_plan(torch.ones(5, 12, dtype=torch.bool), 37, 90, 8)
    q, k, v = qkv(1, 1, 2, 37, 90, 4)
    valid = (torch.arange(90) % 3 > 0)[None]
    valid[:, 16:24] = False
    first = attention_skipping(plan, 6 * q, k, v, margin=2.0, key_valid=valid)
    k[:, :, ~valid[0]], v[:, :, ~valid[0]] = torch.nan, torch.inf
    again = attention_skipping(plan, 6 * q, k, v, margin=2.0, key_valid=valid)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    plan = uniform_plan(torch.ones(1, 1, dtype=torch.bool), 2, 2, 2)
    q, k, v = qkv(0, 1, 1, 2, 2, 4)
    with pytest.raises(KernelError, match="k must have shape"):
        attention_skipping(plan, q, k[:, :, :1], v, margin=1.0)
    with pytest.raises(UnsupportedError, match="give a plan without one"):
        attention_skipping(dataclasses.replace(plan, summary=True), q, k, v, margin=1.0)
    for wrong in ({"margin": -1.0}, {"margin": math.nan}, {"margin": 1.0, "protected": -1}):
        with pytest.raises(ValueError, match="margin and protected must be at least 0"):
            attention_skipping(plan, q, k, v, **wrong)
