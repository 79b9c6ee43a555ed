"""Plans whose skipped blocks answer by their means, under every kernel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import IMPLS, INTERPRETING, SINGLE, TOLERANCE, Case, cases, qkv, random_map, tensors, uniform_plan

from falloff.kernels import run
from falloff.kernels import summary as module
from falloff.plan import Plan, PlanError, dense_plan

every_kernel = pytest.mark.parametrize("impl", IMPLS)
few = settings(max_examples=2 if INTERPRETING else 25, deadline=None)


def assert_equal(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def summarised(plan: Plan) -> Plan:
    return dataclasses.replace(plan, summary=True)


def softmax_with_means(case: Case, scale: float):
    """The oracle: one query at a time, over the keys it keeps and the means of those blocks that it skips."""
    batch, heads, q_len, _ = case.q.shape
    on = case.plan.blocks.dense().expand(batch, heads, -1, -1)
    q_block, kv_block = (x.expand(batch, heads, -1) for x in (case.plan.q_block_of(), case.plan.kv_block_of()))
    out, lse = torch.zeros_like(case.q), torch.full(case.q.shape[:3], -torch.inf, dtype=case.q.dtype)
    for b, h in torch.cartesian_prod(torch.arange(batch), torch.arange(heads)).tolist():
        valid = torch.ones(case.plan.kv_len, dtype=torch.bool) if case.key_valid is None else case.key_valid[b]
        for i in range(q_len):
            logits, values = [], []
            for j in range(on.shape[3]):
                keys = ((kv_block[b, h] == j) & valid).nonzero()[:, 0]
                if len(keys) == 0:
                    continue
                k, v = case.k[b, h, keys], case.v[b, h, keys]
                if not on[b, h, q_block[b, h, i], j]:
                    k, v = k.mean(0, keepdim=True).expand(k.shape), v.mean(0, keepdim=True).expand(v.shape)
                logits.append(scale * k @ case.q[b, h, i])
                values.append(v)
            if logits:
                row = torch.cat(logits)
                out[b, h, i] = row.softmax(0) @ torch.cat(values)
                lse[b, h, i] = row.logsumexp(0)
    return out, lse


@every_kernel
@few
@given(case=cases())
def test_equals_softmax_over_kept_keys_and_means(impl, case):
    plan = summarised(case.plan)
    got = run(plan, case.q, case.k, case.v, scale=0.3, key_valid=case.key_valid, impl=impl)
    assert_equal(got, softmax_with_means(case, 0.3))


@every_kernel
def test_small_chunks_change_nothing(impl, monkeypatch):
    q, k, v = qkv(0, 2, 3, 50, 60, 8)
    plan = summarised(uniform_plan(random_map(1, 2, 3, 7, 8), 50, 60, 8))
    expected = run(plan, q, k, v, impl="reference")
    for most in (1, 3000, 20_000):
        monkeypatch.setattr(module, "WORKING_BYTES", most)
        assert_equal(run(plan, q, k, v, impl=impl), expected)


@few
@given(case=cases())
def test_gradients_equal_the_reference(case):
    generator = torch.Generator().manual_seed(0)
    d_out, d_lse = tensors(generator, *case.q.shape), tensors(generator, *case.q.shape[:3])
    grads = []
    for impl in dict.fromkeys(("reference", *IMPLS)):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = run(summarised(case.plan), *leaves, key_valid=case.key_valid, impl=impl)
        finite = torch.where(lse.isinf(), 0, lse)
        grads.append(torch.autograd.grad((out * d_out).sum() + (finite * d_lse).sum(), leaves))
    for got in grads[1:]:
        assert_equal(got, grads[0])


@pytest.mark.skipif(SINGLE is not None, reason="finite differences need float64")
@every_kernel
def test_gradcheck(impl):
    leaves = tuple(x.requires_grad_() for x in qkv(12, 1, 1, 7, 9, 3))
    plan = summarised(uniform_plan(random_map(12, 1, 2, 3), 7, 9, 4))
    assert torch.autograd.gradcheck(lambda *x: run(plan, *x, impl=impl), leaves)


@every_kernel
def test_equal_keys_of_a_block_make_it_dense_attention(impl):
    q, k, v = qkv(3, 1, 2, 40, 8, 8)
    k, v = (x.repeat_interleave(5, 2) for x in (k, v))
    plan = uniform_plan(random_map(3, 2, 8, 8, density=0.3), 40, 40, 5)
    dense = run(dense_plan(40, 40), q, k, v, impl="reference")
    assert_equal(run(summarised(plan), q, k, v, impl=impl), dense)
    assert not torch.allclose(run(plan, q, k, v, impl=impl)[0], dense[0])


@every_kernel
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30][: 1 if INTERPRETING else None])
def test_invalid_keys_never_influence_a_result(impl, poison):
    q, k, v = qkv(0, 2, 2, 21, 37, 8, torch.float32)
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.6
    valid[:, 8:16] = False  # a whole block
    plan = summarised(uniform_plan(random_map(3, 2, 3, 5), 21, 37, 8))
    hidden = ~valid[:, None, :, None]
    results = [
        run(plan, q, k.masked_fill(hidden, fill), v.masked_fill(hidden, fill), key_valid=valid, impl=impl)
        for fill in (0.0, poison)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_close(impl, dtype):
    low = [x.to(dtype) for x in qkv(10, 1, 2, 96, 96, 32, torch.float32)]
    plan = summarised(uniform_plan(random_map(10, 2, 6, 6), 96, 96, 16))
    out, lse = run(plan, *low, impl=impl)
    expected = run(plan, *(x.float() for x in low), impl="reference")
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_equal(out.float(), expected[0], 3e-2)
    assert_equal(lse, expected[1], 1e-2)


@every_kernel
def test_a_batch_of_two_is_two_batches_of_one(impl):
    q, k, v = qkv(4, 2, 2, 50, 50, 16)
    blocks = random_map(5, 2, 2, 7, 7)
    both = run(summarised(uniform_plan(blocks, 50, 50, 8)), q, k, v, impl=impl)
    for b in range(2):
        plan = summarised(uniform_plan(blocks[b : b + 1], 50, 50, 8))
        assert_equal(run(plan, *(x[b : b + 1] for x in (q, k, v)), impl=impl), tuple(x[b : b + 1] for x in both))


def test_a_plan_counts_its_summary_as_work_and_keeps_its_blocks():
    plan = uniform_plan(torch.eye(4, dtype=torch.bool), 16, 16, 4)
    both = plan, summarised(plan)
    assert [x.density for x in both] == [0.25, 0.25]
    assert [x.flops(batch=2, heads=3, head_dim=8) for x in both] == [4 * 8 * 6 * 64, 4 * 8 * 6 * (64 + 16 * 4)]
    with pytest.raises(PlanError, match="cannot be refined"):
        both[1].refine(2)
