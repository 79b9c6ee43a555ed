"""Leaving blocks out while computing: the published numbers, the bound on the error, and agreement with the rest."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import (
    AUTO,
    EXACT,
    IMPLS,
    INTERPRETING,
    TOLERANCE,
    Case,
    cases,
    qkv,
    random_map,
    tensors,
    uniform_plan,
)
from torch import Tensor

from falloff.kernels import UnsupportedError, choose, reference, run, skip, triton
from falloff.kernels.needs import Needs
from falloff.plan import BlockMap, Plan, PlanError

every_kernel = pytest.mark.parametrize("impl", IMPLS)
LOG2E = math.log2(math.e)


def skipping(plan: Plan, bits: float) -> Plan:
    return dataclasses.replace(plan, skip=bits)


class Visited(NamedTuple):
    out: Tensor
    lse: Tensor
    skipped: Tensor


def visit(case: Case, scale: float) -> Visited:
    """The oracle: one query block at a time visits its key blocks, as the published kernel does."""
    batch, heads, q_len, dim = case.q.shape
    on = case.plan.blocks.dense().expand(batch, heads, -1, -1)
    q_block, kv_block = (x.expand(batch, heads, -1) for x in (case.plan.q_block_of(), case.plan.kv_block_of()))
    out, lse = np.zeros(case.q.shape), np.full((batch, heads, q_len), -np.inf)
    skipped = torch.zeros_like(on)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, on.shape[:3])).tolist():
        queries = (q_block[b, h] == i).nonzero()[:, 0].tolist()
        columns = on[b, h, i].nonzero()[:, 0].tolist()
        top, total = np.full((len(queries), 1), -np.inf), np.zeros((len(queries), 1))
        sums = np.zeros((len(queries), dim))
        for place, j in enumerate(columns):
            keys = kv_block[b, h] == j
            keys = (keys if case.key_valid is None else keys & case.key_valid[b]).nonzero()[:, 0]
            if len(queries) == 0 or len(keys) == 0:
                continue
            logits = (scale * LOG2E * case.q[b, h, queries] @ case.k[b, h, keys].mT).numpy()
            high = logits.max(1, keepdims=True)
            if (high - top).max() + case.plan.skip <= 0 and place < len(columns) - 2:
                skipped[b, h, i, j] = True
                continue
            new = np.maximum(top, high)
            fade, weights = np.exp2(top - new), np.exp2(logits - new)
            total, sums = (
                total * fade + weights.sum(1, keepdims=True),
                sums * fade + weights @ case.v[b, h, keys].numpy(),
            )
            top = new
        if (total > 0).all() and len(queries):
            out[b, h, queries] = sums / total
            lse[b, h, queries] = ((top + np.log2(total)) / LOG2E)[:, 0]
    return Visited(torch.from_numpy(out), torch.from_numpy(lse), skipped)


def one_row(impl: str, logits: list[float], values: list[float], bits: float) -> float:
    """The output of one query over blocks of 16 equal keys each, of these base-2 logits."""
    plan = uniform_plan(torch.ones(1, len(logits), dtype=torch.bool), 1, 16 * len(logits), 16)
    q = torch.ones(1, 1, 1, 1, dtype=EXACT)
    k, v = (torch.tensor(x, dtype=EXACT).repeat_interleave(16).view(1, 1, -1, 1) for x in (logits, values))
    return run(skipping(plan, bits), q, k, v, scale=math.log(2), impl=impl)[0].item()


@every_kernel
@pytest.mark.parametrize(
    ("bits", "protected", "out"),
    [
        (math.inf, 2, 2.00194742),
        (5.0, 0, 2.0),
        (5.0, 2, 2.00292398),
        (10.0, 0, 2.0),
        (10.5, 0, 2.00194742),
    ],
)
def test_published_row(impl: str, bits: float, protected: int, out: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (skip, triton):
        monkeypatch.setattr(module, "PROTECTED", protected)
    assert one_row(impl, [10.0, 0.0, 0.0, 0.0], [2.0, 1.0, 3.0, 4.0], bits) == pytest.approx(
        out, abs=max(5e-9, TOLERANCE)
    )


@every_kernel
def test_the_order_of_visits_matters(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (skip, triton):
        monkeypatch.setattr(module, "PROTECTED", 0)
    assert one_row(impl, [0.0, 10.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0], 5.0) == pytest.approx(
        1.99902439, abs=max(5e-9, TOLERANCE)
    )


def uneven(case: Case, bits: float) -> Case:
    """With blocks of keys whose logits lie many bits apart for all queries alike."""
    lead = case.q.shape[:2]
    blocks = case.plan.blocks.shape[3]
    height = torch.randperm(blocks, generator=torch.Generator().manual_seed(blocks)).to(case.k.dtype) * 3
    direction = torch.ones(case.q.shape[3], dtype=case.k.dtype) / case.q.shape[3]
    k = case.k + height[case.plan.kv_block_of().expand(*lead, -1)][..., None] * direction
    return dataclasses.replace(case, plan=skipping(case.plan, bits), q=case.q + 3, k=k)


@settings(deadline=None, max_examples=30)
@given(case=cases())
def test_the_reference_leaves_out_what_visiting_one_by_one_does(case: Case) -> None:
    # in float64 whatever the kernel of this process: rounding to float32 can turn a decision
    case = uneven(dataclasses.replace(case, q=case.q.double(), k=case.k.double(), v=case.v.double()), 1.0)
    expected = visit(case, 0.3)
    out, lse = run(case.plan, case.q, case.k, case.v, scale=0.3, key_valid=case.key_valid, impl="reference")
    torch.testing.assert_close(out, expected.out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected.lse, rtol=1e-10, atol=1e-10)


def uniform_case(seed: int, q_size: int, kv_size: int, *, ordered: bool, dropped: bool) -> Case:
    """Ragged tails on both sides, and rows of few and of many blocks."""
    generator = torch.Generator().manual_seed(seed)
    batch = 1 if INTERPRETING else 2
    q, k, v = qkv(seed, batch, 2, 5 * q_size - 3, 9 * kv_size - 5, 8)
    orders = [torch.rand(1, 2, x.shape[2], generator=generator).argsort(-1) if ordered else None for x in (q, k)]
    plan = Plan(
        q_len=q.shape[2],
        kv_len=k.shape[2],
        q_sizes=q_size,
        kv_sizes=kv_size,
        q_order=orders[0],
        kv_order=orders[1],
        blocks=BlockMap.from_dense(random_map(seed, 1, 2, 5, 9, density=0.7)),
        partial=True,
    )
    valid = torch.rand(batch, k.shape[2], generator=generator) < 0.6 if dropped else None
    if valid is not None:
        valid[:, 2 * kv_size : 3 * kv_size] = False  # a whole block
    return Case(plan, q, k, v, valid)


@every_kernel
@pytest.mark.parametrize(
    ("q_size", "kv_size", "ordered", "dropped"),
    [(16, 16, False, False), (16, 32, True, True), (5, 16, False, True), (5, 32, True, False)],
)
def test_every_kernel_leaves_out_the_same(impl: str, q_size: int, kv_size: int, ordered: bool, dropped: bool) -> None:
    case = uneven(uniform_case(q_size, q_size, kv_size, ordered=ordered, dropped=dropped), 1.0)
    expected = visit(case, 0.3)
    assert expected.skipped.sum() > 5
    got = run(case.plan, case.q, case.k, case.v, scale=0.3, key_valid=case.key_valid, impl=impl)
    for have, want in zip(got, expected, strict=False):
        torch.testing.assert_close(have.double(), want, rtol=10 * TOLERANCE, atol=10 * TOLERANCE)


def test_few_scores_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = uneven(uniform_case(3, 8, 16, ordered=False, dropped=False), 1.0)
    expected = run(case.plan, case.q, case.k, case.v, impl="cpu")[0]
    monkeypatch.setattr(skip, "SCORES", 300)
    torch.testing.assert_close(run(case.plan, case.q, case.k, case.v, impl="cpu")[0], expected)


@every_kernel
@pytest.mark.parametrize("bits", [0.0, 1.0, 4.0, 8.0])
def test_the_error_is_bounded_by_the_margin(impl: str, bits: float) -> None:
    plan = uniform_plan(torch.ones(3, 6, dtype=torch.bool), 37, 90, 16)
    case = uneven(Case(plan, *qkv(1, 1, 2, 37, 90, 4), None), bits)
    q, k, v = case.q, case.k, case.v
    out, _ = run(case.plan, q, k, v, impl=impl)
    late = skip.late_blocks(case.plan, 0.5 * q @ k.mT, None)
    assert late.any()
    left_out = uniform_plan(late, 37, 90, 16).mask()
    exact = reference.attention(plan, q, k, v, 0.5, None)[0]
    spread = (v[:, :, None] - out[:, :, :, None]).abs().masked_fill(~left_out[..., None], 0).amax(3)
    bound = 2**-bits * left_out.sum(-1, keepdim=True) * spread
    assert bool(((out - exact).abs() <= bound + TOLERANCE).all())
    assert not torch.allclose(out, exact, rtol=0, atol=1e-9)


@every_kernel
def test_an_infinite_margin_is_the_plan_itself(impl: str) -> None:
    plan = uniform_plan(random_map(4, 2, 4, density=0.8), 20, 60, 16)
    case = Case(plan, *qkv(4, 1, 1, 20, 60, 8), None)
    both = [
        run(plan, 8 * case.q, case.k, case.v, key_valid=case.key_valid, impl=impl)
        for plan in (case.plan, skipping(case.plan, math.inf))
    ]
    for got, expected in zip(*both, strict=True):
        torch.testing.assert_close(got, expected, rtol=TOLERANCE, atol=TOLERANCE)


@every_kernel
def test_a_block_stays_for_one_query_that_needs_it(impl: str) -> None:
    plan = skipping(uniform_plan(torch.ones(1, 4, dtype=torch.bool), 2, 64, 16), 5.0)
    one, other = torch.eye(2).mul(8).view(2, 1, 1, 1, 2)
    k = v = torch.eye(2)[[0, 1, 0, 0]].repeat_interleave(16, 0).view(1, 1, 64, 2)
    alike, unlike = (run(plan, torch.cat(q, 2), k, v, scale=1.0, impl=impl)[0] for q in ((one, one), (one, other)))
    assert alike[0, 0, 0, 1] == 0  # the second block was left out
    assert unlike[0, 0, 0, 1] > 0


@every_kernel
@pytest.mark.parametrize("poison", [float("nan"), float("inf")][: 1 if INTERPRETING else None])
def test_dropped_keys_change_nothing_whatever_they_hold(impl: str, poison: float) -> None:
    case = uneven(uniform_case(5, 16, 16, ordered=False, dropped=True), 1.0)
    hidden = ~case.key_valid[:, None, :, None]
    results = [
        run(
            case.plan, case.q, case.k.masked_fill(hidden, fill), case.v.masked_fill(hidden, fill),
            key_valid=case.key_valid, impl=impl,
        )
        for fill in (0.0, poison)
    ]  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_close(impl: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    low = [tensors(generator, 1, 2, 70, 32, dtype=torch.float32).to(dtype) for _ in "qkv"]
    plan = skipping(uniform_plan(torch.ones(5, 5, dtype=torch.bool), 70, 70, 16), 2.0)
    out, lse = run(plan, *low, impl=impl)
    expected = run(plan, *(x.float() for x in low), impl="reference")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    torch.testing.assert_close(out.float(), expected[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(lse, expected[1], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("impl", ["auto", *IMPLS])
def test_a_gradient_is_refused(impl: str) -> None:
    case = uniform_case(6, 8, 16, ordered=False, dropped=False)
    with pytest.raises(UnsupportedError, match="for training give a plan with skip=None"):
        run(skipping(case.plan, 5.0), case.q.requires_grad_(), case.k, case.v, impl=impl)


def test_kernels_that_cannot_are_passed_over_and_refuse_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    q = torch.zeros(1, 1, 48, 16, dtype=torch.bfloat16)
    plan = uniform_plan(torch.ones(3, 3, dtype=torch.bool), 48, 48, 16)
    assert choose(plan, q, needs_lse=False).name == "cpu-tile"
    choice = choose(skipping(plan, 5.0), q, needs_lse=False)
    assert choice.name == AUTO
    assert "leaves no blocks out while it computes" in dict(choice.skipped)["cpu-tile"]
    with pytest.raises(UnsupportedError, match="leaves no blocks out while it computes"):
        run(skipping(plan, 5.0), q, q, q, impl="cpu-tile")
    varying = Plan(q_len=48, kv_len=48, q_sizes=torch.tensor([8, 30, 10]), kv_sizes=16, blocks=plan.blocks, skip=5.0)
    assert choose(varying, q).name == "reference"
    with pytest.raises(UnsupportedError, match="needs blocks of one size"):
        run(varying, q, q, q, impl="cpu")


@pytest.mark.parametrize(
    ("q_sizes", "kv_sizes", "dtype", "fits"),
    [
        (128, 64, torch.float16, True),
        (100, 16, torch.float16, True),
        (16, 16, torch.float16, True),
        (129, 64, torch.float16, False),
        (128, 128, torch.float16, False),
        (128, 48, torch.float16, False),
        (16, torch.tensor([64]), torch.float16, False),
    ],
)
def test_triton_takes_blocks_that_a_tile_holds(q_sizes, kv_sizes, dtype, fits, monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    count = -(-128 // kv_sizes) if isinstance(kv_sizes, int) else 1
    kv_len = 128 if isinstance(kv_sizes, int) else 64
    blocks = BlockMap.from_dense(torch.ones(-(-256 // q_sizes), count, dtype=torch.bool))
    plan = Plan(q_len=256, kv_len=kv_len, q_sizes=q_sizes, kv_sizes=kv_sizes, blocks=blocks, skip=5.0)
    why = triton.refuse(Needs(plan, torch.zeros(1, 1, 256, 64, dtype=dtype)))
    assert (why is None) == fits
    assert fits or "at most 128 queries, and of 16 keys or twice as many up to 64" in str(why)


def test_plans_that_cannot_skip_are_refused() -> None:
    plan = uniform_plan(torch.ones(2, 2, dtype=torch.bool), 8, 8, 4)
    for wrong in (-1.0, math.nan):
        with pytest.raises(PlanError, match="skip must be at least 0 bits"):
            skipping(plan, wrong)
    with pytest.raises(PlanError, match="either skip or summary"):
        dataclasses.replace(plan, skip=5.0, summary=True)
    with pytest.raises(PlanError, match="cannot be refined"):
        skipping(plan, 5.0).refine(2)
