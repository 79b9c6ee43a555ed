"""Every kernel that runs on this GPU against the reference, at the sizes of real heads."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from falloff.kernels import UnsupportedError, attend, available, choose, run
from falloff.kernels.linear import Features, Over, linear_attention
from falloff.plan import BlockMap, Plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

TOKENS = 3000
KERNELS = [name for name, here, _ in available() if here and name != "reference"]


def uniform(size: int) -> Plan:
    count = -(-TOKENS // size)
    generator = torch.Generator().manual_seed(size)
    blocks = torch.rand(4, count, count, generator=generator) < 0.3
    blocks |= torch.eye(count, dtype=torch.bool)
    return Plan(q_len=TOKENS, kv_len=TOKENS, q_sizes=size, kv_sizes=size, blocks=BlockMap.from_dense(blocks))


def clusters() -> Plan:
    """Sizes from none to hundreds and an order of its own in every head, as k-means gives them."""
    generator = torch.Generator().manual_seed(0)

    def sizes(count: int) -> Tensor:
        cuts = torch.randint(0, TOKENS + 1, (1, 4, count - 1), generator=generator).sort(-1).values
        ends = torch.cat([cuts, torch.full((1, 4, 1), TOKENS)], -1)
        return ends.diff(prepend=torch.zeros(1, 4, 1, dtype=torch.int64))

    return Plan(
        q_len=TOKENS,
        kv_len=TOKENS,
        q_sizes=sizes(20),
        kv_sizes=sizes(70),
        q_order=torch.rand(1, 4, TOKENS, generator=generator).argsort(-1),
        kv_order=torch.rand(1, 4, TOKENS, generator=generator).argsort(-1),
        blocks=BlockMap.from_dense(torch.rand(4, 20, 70, generator=generator) < 0.3),
        partial=True,
    )


PLANS = {"blocks of 128": lambda: uniform(128), "blocks of 64": lambda: uniform(64), "clusters": clusters}


def results(plan: Plan, inputs: list[Tensor], impl: str, key_valid: Tensor | None) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, lse = run(plan, *leaves, impl=impl, key_valid=key_valid)
    generator = torch.Generator(out.device).manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, device=out.device)
    loss = (out.float() * weight).sum() + lse.masked_fill(lse.isinf(), 0).sum()
    return [out, lse, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dropped", [False, True], ids=["all-keys", "some-keys"])
@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-5)], ids=str
)
@pytest.mark.parametrize("plan_name", PLANS)
@pytest.mark.parametrize("impl", KERNELS)
def test_agrees_with_the_reference(
    impl: str, plan_name: str, dtype: torch.dtype, tolerance: float, head_dim: int, dropped: bool
) -> None:
    plan = PLANS[plan_name]().to("cuda")
    generator = torch.Generator("cuda").manual_seed(2)
    shape = (2, TOKENS, 4, head_dim)  # as models give them: heads beside channels
    inputs = [torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]
    valid = torch.rand(2, TOKENS, generator=generator, device="cuda") < 0.7 if dropped else None
    try:
        choose(plan, inputs[0], impl=impl, needs_grad=True, drops_keys=dropped)
    except UnsupportedError as refusal:
        pytest.skip(str(refusal))
    exact = results(plan, [x.float() for x in inputs], "reference", valid)
    for got, expected in zip(results(plan, inputs, impl, valid), exact, strict=True):
        assert torch.equal(got.isinf(), expected.isinf())
        error = (got.float() - expected).masked_fill(expected.isinf(), 0).norm()
        assert error <= tolerance * expected.masked_fill(expected.isinf(), 0).norm()


def test_our_kernel_gives_the_same_bits_every_time() -> None:
    plan = uniform(128).to("cuda")
    generator = torch.Generator("cuda").manual_seed(3)
    inputs = [torch.randn(1, 4, TOKENS, 128, generator=generator, device="cuda").bfloat16() for _ in range(3)]
    first, second = (results(plan, inputs, "triton", None) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def band(tokens: int, size: int = 128) -> Plan:
    """Each block sees itself and the one before."""
    count = -(-tokens // size)
    near = torch.eye(count, dtype=torch.bool) | torch.eye(count, dtype=torch.bool).roll(-1, 1)
    return Plan(q_len=tokens, kv_len=tokens, q_sizes=size, kv_sizes=size, blocks=BlockMap.from_dense(near))


def test_tensors_of_more_elements_than_32_bits_count() -> None:
    batch, heads, tokens, head_dim = 2, 40, 2**18 + 70, 128
    assert batch * heads * tokens * head_dim > 2**31
    if torch.cuda.mem_get_info()[0] < 64 << 30:
        pytest.skip("needs 64 GiB of free memory")
    plan = band(tokens).to("cuda")
    generator = torch.Generator("cuda").manual_seed(5)
    shape = (batch, tokens, heads, head_dim)
    q, k, v, weight = (
        torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    last = [x[-1:, -1:].clone().requires_grad_() for x in (q, k, v)]
    whole = [x.requires_grad_() for x in (q, k, v)]
    expected = attend(plan, *last, impl="triton")
    out = attend(plan, *whole, impl="triton")
    assert torch.equal(out[-1:, -1:], expected)
    for got, want in zip(
        torch.autograd.grad(out, whole, weight),
        torch.autograd.grad(expected, last, weight[-1:, -1:]),
        strict=True,
    ):
        assert torch.equal(got[-1:, -1:], want)


def test_a_captured_call_computes_anew_when_it_is_replayed() -> None:
    plan = uniform(128).to("cuda")
    generator = torch.Generator("cuda").manual_seed(6)
    first, second = (
        [torch.randn(1, 4, TOKENS, 128, generator=generator, device="cuda").bfloat16() for _ in range(3)]
        for _ in range(2)
    )
    attend(plan, *first, impl="triton")  # what is compiled, tried and derived from the plan is so before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend(plan, *first, impl="triton")
    for held, new in zip(first, second, strict=True):
        held.copy_(new)
    graph.replay()
    assert torch.equal(out, attend(plan, *second, impl="triton"))


def linear_results(plan: Plan, inputs: list[Tensor], impl: str, valid: Tensor, **settings: str) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, denominators = linear_attention(plan, *leaves, impl=impl, key_valid=valid, **settings)
    weight = torch.randn(out.shape, generator=torch.Generator(out.device).manual_seed(1), device=out.device)
    loss = (out.float() * weight).sum() + denominators.sum()
    return [out, denominators, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("head_dim", [72, 128, 256])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-2), (torch.float32, 1e-4)], ids=str
)
@pytest.mark.parametrize("over", get_args(Over))
@pytest.mark.parametrize("features", get_args(Features))
@pytest.mark.parametrize("plan_name", ["blocks of 64", "clusters"])
def test_linear_attention_agrees_with_pytorchs_operators(
    plan_name: str, features: str, over: str, dtype: torch.dtype, tolerance: float, head_dim: int
) -> None:
    plan = PLANS[plan_name]().to("cuda")
    generator = torch.Generator("cuda").manual_seed(4)
    shape, settings = (2, TOKENS, 4, head_dim), {"features": features, "over": over}
    inputs = [torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(1, 2) for _ in range(3)]
    valid = torch.rand(2, TOKENS, generator=generator, device="cuda") < 0.7
    exact = linear_results(plan, [x.double() for x in inputs], "torch", valid, **settings)
    for impl in ("auto", "triton"):
        found = linear_results(plan, inputs, impl, valid, **settings)
        assert found[0].dtype == dtype
        for got, expected in zip(found, exact, strict=True):
            assert (got.double() - expected).norm() <= tolerance * expected.norm()
