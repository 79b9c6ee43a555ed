"""The kernel on AMX tiles: the invariants of every kernel within what bfloat16 leaves, and its own paths."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from kernel_cases import Case, cases, qkv, random_map, uniform_plan

from falloff.kernels import UnsupportedError, choose, cpu_amx, cpu_simd, merge, run
from falloff.plan import BlockMap, Plan, dense_plan

here = pytest.mark.skipif(cpu_amx.absent() is not None, reason=str(cpu_amx.absent()))
both_types = pytest.mark.parametrize("dtype", cpu_amx.PARTS)
few = settings(max_examples=40, deadline=None)
EPS = {1: 2.0**-8, 2: 2.0**-15}
"""By the parts of a number: what rounding it, or leaving off its further bits, may change of it."""


def in_parts(parts: int, plan: Plan, q, k, v, valid=None):
    """Out and LSE in float32, of numbers made of so many bfloat16."""
    return cpu_simd.attend(cpu_simd.Library(cpu_amx.SOURCE, parts), plan, q, k, v, q.shape[3] ** -0.5, valid)


def results(attend, leaves, d_out, d_lse):
    """Out, LSE and gradients through both, as float64."""
    leaves = [x.clone().requires_grad_() for x in leaves]
    out, lse = attend(*leaves)
    total = (out * d_out.to(out.dtype)).sum() + (torch.where(lse.isinf(), 0, lse) * d_lse.to(lse.dtype)).sum()
    return [x.detach().double() for x in (out, lse, *torch.autograd.grad(total, leaves))]


def assert_close(got, expected, eps):
    """Every number within ``eps`` of the largest."""
    assert not got.isnan().any()  # infinities of both sides alone may differ by NaN below
    assert torch.equal(got.isinf(), expected.isinf())
    largest = expected.nan_to_num(neginf=0).abs().max().clamp(min=1)
    assert (got - expected).nan_to_num().abs().max() <= eps * largest


@here
@pytest.mark.parametrize("parts", EPS)
@few
@given(case=cases())
def test_output_lse_and_gradients_equal_the_reference(parts: int, case: Case) -> None:
    tensors = [x.to(torch.bfloat16).double() if parts == 1 else x for x in (case.q, case.k, case.v)]
    generator = torch.Generator().manual_seed(0)
    d_out, d_lse = (torch.randn(shape, generator=generator) for shape in (case.q.shape, case.q.shape[:3]))
    d_out = d_out.to(torch.bfloat16).float() if parts == 1 else d_out
    expected = results(
        lambda *x: run(case.plan, *x, key_valid=case.key_valid, impl="reference"), tensors, d_out.double(), d_lse
    )
    single = [x.float() for x in tensors]
    got = results(lambda *x: in_parts(parts, case.plan, *x, case.key_valid), single, d_out, d_lse)
    for mine, theirs in zip(got, expected, strict=True):
        assert_close(mine, theirs, 8 * EPS[parts])


@here
@both_types
@pytest.mark.parametrize("dim", [20, 32, 130, 256])
@pytest.mark.parametrize("sizes", [(128, 128), (64, 100), (300, 30)])
def test_tiles_strips_and_tails_are_as_close_as_sdpa(dim: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    blocks = random_map(0, 2, -(-431 // sizes[0]), -(-389 // sizes[1]), density=0.7)
    blocks[..., 0] = True
    plan = Plan(q_len=431, kv_len=389, q_sizes=sizes[0], kv_sizes=sizes[1], blocks=BlockMap.from_dense(blocks))
    low = [x.to(dtype) for x in qkv(1, 2, 2, 431, 389, dim)]
    d_out, d_lse = torch.randn(2, 2, 431, dim).to(dtype), torch.zeros(2, 2, 431)
    expected = results(lambda *x: run(plan, *x, impl="reference"), [x.double() for x in low], d_out, d_lse)
    got = results(lambda *x: run(plan, *x, impl="cpu-amx"), low, d_out, d_lse)
    mask = plan.mask()
    sdpa = results(
        lambda *x: (F.scaled_dot_product_attention(*x, attn_mask=mask), torch.zeros(2, 2, 431)), low, d_out, d_lse
    )
    for n in (0, 2, 3, 4):
        assert (got[n] - expected[n]).norm() <= 2 * (sdpa[n] - expected[n]).norm()
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)


@here
@both_types
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_turn_scores_round_or_make_all_alike(scale: float, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(9, 1, 2, 70, 45, 24))
    plan = dense_plan(70, 45, 30)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out, lse = run(plan, *leaves, scale=scale, impl="cpu-amx")
    expected, expected_lse = run(plan, *exact, scale=scale, impl="reference")
    assert_close(out.double(), expected, 0.02)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(x.double().square().sum(), each) for x, each in ((out, leaves), (expected, exact))]
    for got, true in zip(*grads, strict=True):
        assert_close(got.double(), true, 0.02)


@here
@both_types
def test_a_map_merged_with_its_complement_is_dense(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in qkv(2, 1, 2, 150, 150, 32))
    blocks = random_map(3, 2, 5, 5)
    branches = [run(uniform_plan(b, 150, 150, 32), q, k, v, impl="cpu-amx") for b in (blocks, ~blocks)]
    expected = run(dense_plan(150, 150), *(x.double() for x in (q, k, v)), impl="reference")
    for got, exact in zip(merge(*branches), expected, strict=True):
        assert_close(got.double(), exact, 0.02)


@here
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_invalid_keys_never_influence_a_result(poison: float) -> None:
    q, k, v = (x.to(torch.bfloat16) for x in qkv(0, 2, 2, 21, 37, 8))
    valid = torch.rand(2, 37, generator=torch.Generator().manual_seed(2)) < 0.6
    hidden = ~valid[:, None, :, None]
    found = []
    for fill in (0.0, poison):
        leaves = [q.clone(), k.masked_fill(hidden, fill), v.masked_fill(hidden, fill)]
        plan = uniform_plan(random_map(3, 2, 3, 5), 21, 37, 8)
        out, lse = run(plan, *[x.requires_grad_() for x in leaves], key_valid=valid, impl="cpu-amx")
        grads = torch.autograd.grad(out.sum() + torch.where(lse.isinf(), 0, lse).sum(), leaves)
        found.append((out, lse, *grads))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@here
@both_types
@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(name: str, poison: float, dtype: torch.dtype) -> None:
    tensors = dict(zip("qkv", (x.to(dtype) for x in qkv(6, 1, 1, 70, 70, 16)), strict=True))
    tensors[name][0, 0, 5] = poison
    out, _ = run(dense_plan(70, 70, 32), *tensors.values(), impl="cpu-amx")
    expected, _ = run(dense_plan(70, 70, 32), *tensors.values(), impl="reference")
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out.isfinite().all()


@here
def test_the_number_of_threads_changes_no_bit() -> None:
    plan = uniform_plan(random_map(4, 2, 9, 9) | torch.eye(9, dtype=torch.bool), 550, 550, 64)
    leaves = [x.to(torch.bfloat16).requires_grad_() for x in qkv(5, 2, 2, 550, 550, 32)]
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, lse = run(plan, *leaves, impl="cpu-amx")
            answers.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


@here
def test_products_of_pytorch_are_the_same_after_it() -> None:
    """PyTorch's own products shape the tiles for themselves, and may remember that they did."""
    a, b = (x[0, 0].to(torch.bfloat16) for x in qkv(7, 1, 1, 96, 96, 96)[:2])
    q, k, v = (x.to(torch.bfloat16) for x in qkv(8, 1, 2, 96, 96, 32))
    products = []
    for _ in range(3):
        products.append((a @ b.mT, F.scaled_dot_product_attention(q, k, v)))
        run(dense_plan(96, 96, 32), q, k, v, impl="cpu-amx")
    assert all(torch.equal(x, y) for later in products[1:] for x, y in zip(products[0], later, strict=True))


@here
def test_auto_takes_it_for_half_precision_and_its_like_alone() -> None:
    plan, q = dense_plan(96, 96, 32), torch.zeros(1, 1, 96, 32)
    assert choose(plan, q.bfloat16()).name == choose(plan, q.half(), needs_grad=True).name == "cpu-amx"
    assert choose(plan, q).name == "cpu-simd"
    with pytest.raises(UnsupportedError, match="multiplies bfloat16 and float16, the tensors are torch"):
        run(plan, q, q, q, impl="cpu-amx")
    summarised = dataclasses.replace(
        dense_plan(96, 96, 32), blocks=BlockMap.from_dense(torch.eye(3, dtype=torch.bool)), summary=True
    )
    assert choose(summarised, q.bfloat16()).name == "cpu-simd"


def test_a_cpu_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert "the CPU has no AMX" in str(cpu_amx.absent())
