"""What must hold for every kernel."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from kernel_cases import IMPLS, INTERPRETING, SINGLE, TOLERANCE, Case, cases, qkv, random_map, tensors, uniform_plan
from torch.nn.attention import SDPBackend, sdpa_kernel

from falloff.kernels import compiled, merge, run
from falloff.plan import BlockMap, Plan, dense_plan

every_kernel = pytest.mark.parametrize("impl", IMPLS)
LOWERED = torch.backends.cpu.get_cpu_capability() != "AVX512" and compiled.offers("amx_tile", unknown=False)
PYTORCHS = SDPBackend.MATH if LOWERED else SDPBackend.FLASH_ATTENTION
"""PyTorch's flash operator fails in bfloat16 on a CPU with AMX that is told to use lower vectors."""
few = settings(max_examples=2 if INTERPRETING else 40, deadline=None)


def assert_equal(got, expected, tolerance=TOLERANCE):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def masked_softmax(case: Case, scale: float):
    """The oracle: written apart from the reference, one query at a time."""
    batch, heads, q_len, _ = case.q.shape
    kept = case.plan.mask().expand(batch, heads, -1, -1)
    if case.key_valid is not None:
        kept = kept & case.key_valid[:, None, None]
    out, lse = torch.zeros_like(case.q), torch.full(case.q.shape[:3], -torch.inf, dtype=case.q.dtype)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, (batch, heads, q_len))).tolist():
        keys = kept[b, h, i].nonzero()[:, 0]
        if len(keys):
            logits = scale * case.k[b, h, keys] @ case.q[b, h, i]
            out[b, h, i] = logits.softmax(0) @ case.v[b, h, keys]
            lse[b, h, i] = logits.logsumexp(0)
    return out, lse


@every_kernel
@few
@given(case=cases())
def test_equals_softmax_over_the_kept_keys(impl, case):
    expected = masked_softmax(case, 0.3)
    assert_equal(run(case.plan, case.q, case.k, case.v, scale=0.3, key_valid=case.key_valid, impl=impl), expected)


@few
@given(case=cases())
def test_gradients_equal_the_reference(case):
    grads = []
    generator = torch.Generator().manual_seed(0)
    d_out, d_lse = tensors(generator, *case.q.shape), tensors(generator, *case.q.shape[:3])
    for impl in dict.fromkeys(("reference", *IMPLS)):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out, lse = run(case.plan, *leaves, key_valid=case.key_valid, impl=impl)
        finite = torch.where(lse.isinf(), 0, lse)
        only_out = torch.autograd.grad((out * d_out).sum(), leaves, retain_graph=True)
        grads.append((only_out, torch.autograd.grad((out * d_out).sum() + (finite * d_lse).sum(), leaves)))
    for got in grads[1:]:
        assert_equal(got, grads[0])


@pytest.mark.skipif(SINGLE is None, reason="at 16 plain single precision is off by as much")
@pytest.mark.parametrize("scale", [1, 4, 16])
@every_kernel
def test_gradients_at_larger_inputs_stay_within_single_precision(impl, scale):
    plan = uniform_plan(random_map(3, 2, 5, 5) | torch.eye(5, dtype=torch.bool), 150, 150, 32)
    single = [(scale * x).requires_grad_() for x in qkv(2, 1, 2, 150, 150, 32, torch.float32)]
    exact = [x.detach().double().requires_grad_() for x in single]
    grads = [
        torch.autograd.grad(run(plan, *leaves, impl=named)[0].square().sum(), leaves)
        for named, leaves in (("reference", exact), (impl, single))
    ]
    for expected, got in zip(*grads, strict=True):
        assert (got - expected).norm() <= 1e-4 * expected.norm()


@every_kernel
@few
@given(case=cases())
def test_permuting_tokens_and_orders_together_permutes_the_output(impl, case):
    generator = torch.Generator().manual_seed(1)
    q_move, kv_move = (torch.randperm(n, generator=generator) for n in (case.plan.q_len, case.plan.kv_len))
    q_order, kv_order = (
        move.argsort()[torch.arange(len(move)) if order is None else order]
        for move, order in ((q_move, case.plan.q_order), (kv_move, case.plan.kv_order))
    )
    moved = dataclasses.replace(case.plan, q_order=q_order, kv_order=kv_order)
    valid = case.key_valid
    got = run(
        moved,
        case.q[:, :, q_move],
        case.k[:, :, kv_move],
        case.v[:, :, kv_move],
        key_valid=None if valid is None else valid[:, kv_move],
        impl=impl,
    )
    out, lse = run(case.plan, case.q, case.k, case.v, key_valid=valid, impl=impl)
    assert_equal(got, (out[:, :, q_move], lse[:, :, q_move]))


def halves(case: Case):
    """The case's plan, one of some of the blocks that it leaves out, and the plan of both."""
    blocks = case.plan.blocks.dense()
    others = ~blocks & (torch.rand(blocks.shape, generator=torch.Generator().manual_seed(3)) < 0.5)
    return [dataclasses.replace(case.plan, blocks=BlockMap.from_dense(b)) for b in (blocks, others, blocks | others)]


@every_kernel
@few
@given(case=cases())
def test_two_maps_without_common_blocks_merge_to_what_both_see(impl, case):
    *parts, union = halves(case)
    branches = [run(plan, case.q, case.k, case.v, key_valid=case.key_valid, impl=impl) for plan in parts]
    expected = run(union, case.q, case.k, case.v, key_valid=case.key_valid, impl=impl)
    assert_equal(merge(*branches), expected, min(TOLERANCE, 1e-6))


@every_kernel
@few
@given(case=cases())
def test_gradients_through_a_merge_are_those_of_the_union(impl, case):
    generator = torch.Generator().manual_seed(0)
    d_out, d_lse = tensors(generator, *case.q.shape), tensors(generator, *case.q.shape[:3])
    *parts, union = halves(case)
    grads = []
    for plans, name in ((parts, impl), ([union], "reference")):
        leaves = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        branches = [run(plan, *leaves, key_valid=case.key_valid, impl=name) for plan in plans]
        out, lse = merge(*branches) if len(branches) > 1 else branches[0]
        total = (out * d_out).sum() + (torch.where(lse.isinf(), 0, lse) * d_lse).sum()
        grads.append(torch.autograd.grad(total, leaves))
    assert_equal(grads[0], grads[1])


@every_kernel
def test_a_branch_over_the_text_of_each_sample_merges_to_one_softmax(impl):
    """As HunyuanVideo's text, whose length is every sample's own."""
    q, k, v = qkv(14, 2, 2, 40, 50, 16)  # 40 tokens of video, 10 of text
    valid = torch.arange(50) < torch.tensor([43, 48])[:, None]
    blocks = random_map(14, 2, 5, 5) | torch.eye(5, dtype=torch.bool)
    video = run(uniform_plan(blocks, 40, 40, 8), q, k[:, :, :40], v[:, :, :40], impl=impl)
    text = run(dense_plan(40, 10), q, k[:, :, 40:], v[:, :, 40:], key_valid=valid[:, 40:], impl=impl)
    seen = torch.cat(
        [uniform_plan(blocks, 40, 40, 8).mask().expand(2, -1, -1, -1), valid[:, None, None, 40:].expand(2, 2, 40, 10)],
        -1,
    )
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    assert_equal(merge(video, text)[0], expected)


@every_kernel
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30][: 1 if INTERPRETING else None])
def test_invalid_keys_never_influence_a_result(impl, poison):
    q, k, v = qkv(0, 2, 2, 21, 37, 8, torch.float32)
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.6
    for blocks in (random_map(3, 2, 3, 5), torch.ones(3, 5, dtype=torch.bool)):
        plan = uniform_plan(blocks, 21, 37, 8)
        results = []
        for fill in (0.0, poison):
            hidden = ~valid[:, None, :, None]
            leaves = [q.clone(), k.masked_fill(hidden, fill), v.masked_fill(hidden, fill)]
            out, lse = run(plan, *[x.requires_grad_() for x in leaves], key_valid=valid, impl=impl)
            grads = torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0, lse).sum(), leaves)
            results.append((out, lse, *grads))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert not grads[1].masked_select(hidden).any()


@every_kernel
def test_all_on_equals_sdpa_also_for_strided_inputs(impl):
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(1, 2, 3, 65, 65, 16, torch.float32))
    expected = F.scaled_dot_product_attention(q, k, v)
    out, lse = run(dense_plan(65, 65, 32), q, k, v, impl=impl)
    assert_equal(out, expected, 1e-6)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    every_other = [torch.cat([x, x], -1)[..., ::2] for x in (q, k, v)]
    assert_equal(
        run(dense_plan(65, 65, 32), *every_other, impl=impl)[0], F.scaled_dot_product_attention(*every_other), 1e-6
    )


@every_kernel
def test_all_on_equals_sdpa_block_by_block(impl):
    """With a gradient or with words about keys no kernel leaves the whole map to PyTorch's operator."""
    q, k, v = qkv(1, 2, 3, 65, 65, 16, torch.float32)
    expected = F.scaled_dot_product_attention(q, k, v)
    plan, valid = dense_plan(65, 65, 32), torch.ones(2, 65, dtype=torch.bool)
    assert_equal(run(plan, q, k, v, key_valid=valid, impl=impl)[0], expected, 1e-6)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, _ = run(plan, *leaves, impl=impl)
    assert_equal(out.detach(), expected, 1e-6)
    got = torch.autograd.grad(out.square().sum(), leaves)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*exact).square().sum(), exact)
    assert_equal(got, tuple(x.float() for x in wanted), 1e-5)


@every_kernel
def test_a_diagonal_map_is_attention_inside_each_block(impl):
    q, k, v = qkv(2, 1, 2, 64, 64, 8)
    out, _ = run(uniform_plan(torch.eye(4, dtype=torch.bool), 64, 64, 16), q, k, v, impl=impl)
    alone = [F.scaled_dot_product_attention(*(x[:, :, s : s + 16] for x in (q, k, v))) for s in range(0, 64, 16)]
    assert_equal(out, torch.cat(alone, 2))


@every_kernel
def test_permuting_heads_with_their_maps_permutes_the_output(impl):
    q, k, v = qkv(3, 1, 3, 30, 30, 8)
    blocks, turn = random_map(4, 3, 4, 4), torch.tensor([2, 0, 1])
    straight = run(uniform_plan(blocks, 30, 30, 8), q, k, v, impl=impl)
    turned = run(uniform_plan(blocks[turn], 30, 30, 8), q[:, turn], k[:, turn], v[:, turn], impl=impl)
    assert all(torch.equal(a[:, turn], b) for a, b in zip(straight, turned, strict=True))


@every_kernel
def test_a_batch_of_two_is_two_batches_of_one(impl):
    q, k, v = qkv(4, 2, 2, 50, 50, 16)
    blocks = random_map(5, 2, 2, 7, 7)
    both = run(uniform_plan(blocks, 50, 50, 8), q, k, v, impl=impl)
    for b in range(2):
        alone = run(uniform_plan(blocks[b : b + 1], 50, 50, 8), *(x[b : b + 1] for x in (q, k, v)), impl=impl)
        assert_equal(alone, tuple(x[b : b + 1] for x in both))


@every_kernel
def test_an_empty_row_gives_zero_minus_infinity_and_no_gradient(impl):
    leaves = [x.requires_grad_() for x in qkv(5, 1, 1, 24, 24, 8)]
    blocks = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    out, lse = run(uniform_plan(blocks, 24, 24, 8), *leaves, impl=impl)
    assert not out[:, :, 8:16].any()
    assert (lse[:, :, 8:16] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, :8].sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][:, :, 8:16].any()


@every_kernel
def test_a_tail_of_one_token_gives_its_value(impl):
    q, k, v = qkv(6, 1, 1, 17, 17, 8)
    blocks = torch.zeros(3, 3, dtype=torch.bool)
    blocks[:, 2] = True
    out, lse = run(uniform_plan(blocks, 17, 17, 8), q, k, v, scale=0.5, impl=impl)
    assert_equal(out, v[:, :, 16:].expand_as(out))
    assert_equal(lse, 0.5 * (q * k[:, :, 16:]).sum(-1))


@every_kernel
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("maps", "density"), [((), 0.1), ((1, 2), 0.5), ((2, 1), 0.8), ((2, 2), 1.0)])
def test_float32_over_many_lengths(impl, length, size, maps, density):
    """Shared maps, and a map of their own for heads, samples and both."""
    q, k, v = qkv(7, 2, 2, length, 77, 32, torch.float32)
    blocks = random_map(length, *maps, -(-length // size), -(-77 // size), density=density)
    plan = uniform_plan(blocks, length, 77, size)
    kept = plan.mask().expand(2, 2, -1, -1)
    logits = (q.double() @ k.double().mT * 32**-0.5).masked_fill(~kept, -torch.inf)
    expected = logits.softmax(-1).nan_to_num() @ v.double(), logits.logsumexp(-1)  # a row without keys is 0
    got = run(plan, q, k, v, impl=impl)
    assert_equal(tuple(x.double() for x in got), expected, 1e-5)


@every_kernel
def test_a_thousand_keys_and_lengths_one_after_the_other(impl):
    """Twelve lengths in one process: what is compiled or kept for one must not serve another."""
    for length in (*range(90, 1001, 90), 1000):
        q, k, v = qkv(15, 1, 2, length, length, 32, torch.float32)
        plan = uniform_plan(random_map(length, 2, -(-length // 64), -(-length // 64), density=0.3), length, length, 64)
        out, lse = run(plan, q, k, v, impl=impl)
        expected = run(plan, q.double(), k.double(), v.double(), impl="reference")
        assert_equal((out.double(), lse.double()), expected, 1e-5)


@every_kernel
def test_a_new_map_of_the_same_shape_changes_the_output(impl):
    q, k, v = qkv(8, 1, 1, 64, 64, 8)
    first, second = (run(uniform_plan(random_map(s, 4, 4), 64, 64, 16), q, k, v, impl=impl)[0] for s in (1, 2))
    assert not torch.allclose(first, second)


@every_kernel
def test_equal_variable_sizes_equal_uniform_blocks(impl):
    q, k, v = qkv(9, 1, 2, 48, 48, 8)
    blocks = BlockMap.from_dense(random_map(9, 2, 6, 6))
    sizes = torch.full((6,), 8)
    variable = Plan(q_len=48, kv_len=48, q_sizes=sizes, kv_sizes=sizes, blocks=blocks, partial=True)
    uniform = Plan(q_len=48, kv_len=48, q_sizes=8, kv_sizes=8, blocks=blocks, partial=True)
    assert_equal(run(variable, q, k, v, impl=impl), run(uniform, q, k, v, impl=impl))


@every_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_as_close_as_sdpa(impl, dtype):
    exact = qkv(10, 1, 2, 96, 96, 32, torch.float32)
    low = [x.to(dtype) for x in exact]
    plan = uniform_plan(random_map(10, 2, 6, 6) | torch.eye(6, dtype=torch.bool), 96, 96, 16)
    expected = run(plan, *(x.float() for x in low), impl="reference")
    out, lse = run(plan, *low, impl=impl)
    with sdpa_kernel(PYTORCHS):
        sdpa = F.scaled_dot_product_attention(*low, attn_mask=plan.mask())
    allowed = 2 * (sdpa.float() - expected[0]).norm()
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert (out.float() - expected[0]).norm() <= allowed
    assert_equal(lse, expected[1], 1e-2)


@every_kernel
def test_low_precision_gradients_are_close(impl):
    low = [x.to(torch.bfloat16) for x in qkv(11, 1, 2, 40, 40, 16, torch.float32)]
    plan = uniform_plan(random_map(11, 2, 5, 5) | torch.eye(5, dtype=torch.bool), 40, 40, 8)
    grads = []
    for leaves, name in (([x.clone() for x in low], impl), ([x.double() for x in low], "reference")):
        out, lse = run(plan, *[x.requires_grad_() for x in leaves], impl=name)
        grads.append(torch.autograd.grad(out.double().square().sum() + lse.double().sum(), leaves))
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.skipif(
    SINGLE is not None, reason="finite differences need float64; the gradients meet the reference above"
)
@every_kernel
def test_gradcheck_through_both_results_and_a_merge(impl):
    leaves = tuple(x.requires_grad_() for x in qkv(12, 1, 2, 11, 13, 3))
    blocks = random_map(12, 2, 3, 4)
    plans = [uniform_plan(b, 11, 13, 4) for b in (blocks, ~blocks)]

    def merged(q, k, v):
        return merge(*(run(plan, q, k, v, impl=impl) for plan in plans))

    def alone(q, k, v):
        out, lse = run(plans[0], q, k, v, impl=impl)
        return out, torch.where(lse.isinf(), 0, lse)

    assert torch.autograd.gradcheck(merged, leaves)
    assert torch.autograd.gradcheck(alone, leaves)
    assert torch.autograd.gradcheck(lambda *x: alone(*x)[0], leaves)


@every_kernel
def test_refined_plans_give_the_same_result(impl):
    q, k, v = qkv(13, 1, 2, 50, 50, 8)
    plan = uniform_plan(random_map(13, 2, 4, 4), 50, 50, 16)
    assert_equal(run(plan.refine(4), q, k, v, impl=impl), run(plan, q, k, v, impl=impl))
