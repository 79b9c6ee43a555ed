"""Linear attention's Triton kernels on the CPU: run by test_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import pytest
import torch
from kernel_cases import qkv, tensors
from torch import Tensor

from falloff.kernels import UnsupportedError, linear
from falloff.kernels.linear import Features, Over, linear_attention
from falloff.kernels.trial import Trial
from falloff.plan import BlockMap, Plan

SIZES = torch.tensor([0, 1, 26, 5, 18])
"""Of 50 tokens: none, one, few, more than a tile."""
Q, K = 50, 70


def classes(seed: int, *shape: int) -> Tensor:
    """Critical, marginal and dropped blocks, among them a row of each without the others."""
    marks = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed))
    marks[..., 0, :], marks[..., 1, :] = 1, 0
    return marks


def plan_of(marks: Tensor, lengths: tuple[int, int], sizes: tuple[Any, Any], orders: tuple[Any, Any] = (None, None)):
    blocks, dropped = (BlockMap.from_dense(marks == wanted) for wanted in (1, -1))
    named = {"q_len": lengths[0], "kv_len": lengths[1], "q_sizes": sizes[0], "kv_sizes": sizes[1]}
    return Plan(**named, blocks=blocks, dropped=dropped, q_order=orders[0], kv_order=orders[1], partial=True)


def uniform(heads: int = 1) -> Plan:
    lengths = (Q, K)
    return plan_of(classes(0, 1, heads, *(-(-length // 32) for length in lengths)), lengths, (32, 32))


def clustered() -> Plan:
    generator = torch.Generator().manual_seed(1)
    turned = SIZES[torch.stack([torch.randperm(5, generator=generator) for _ in range(2)])].view(1, 2, 5)
    orders = (torch.rand(Q, generator=generator).argsort(), torch.rand(1, 2, Q, generator=generator).argsort(-1))
    return plan_of(classes(2, 1, 2, 5, 5), (Q, Q), (SIZES, turned), orders)


def results(plan: Plan, impl: str, inputs: tuple[Tensor, ...], **settings: Any) -> tuple[Tensor, ...]:
    """Out, denominators and the gradients of a random weighting of both."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, denominators = linear_attention(plan, *leaves, impl=impl, **settings)
    generator = torch.Generator().manual_seed(9)
    loss = (out.float() * tensors(generator, *out.shape)).sum()
    loss = loss + (denominators * tensors(generator, *denominators.shape)).sum()
    return out.detach(), denominators.detach(), *torch.autograd.grad(loss, leaves)


def agree(plan: Plan, inputs: tuple[Tensor, ...], tolerance: float = 1e-5, **settings: Any) -> None:
    found = results(plan, "triton", inputs, **settings)
    exact = results(plan, "torch", tuple(x.double() for x in inputs), **settings)
    assert found[0].dtype == inputs[0].dtype
    assert found[1].dtype == torch.float32
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(("features", "over"), [*product(get_args(Features), get_args(Over))])
def test_forward_and_backward(features: str, over: str) -> None:
    agree(uniform(2), qkv(1, 1, 2, Q, K, 16), features=features, over=over)


@pytest.mark.parametrize("over", get_args(Over))
def test_clusters_of_their_own_in_every_head_orders_of_both_sides_and_padding(over: str) -> None:
    q, k, v = qkv(3, 2, 2, Q, Q, 16)
    valid = torch.rand(2, Q, generator=torch.Generator().manual_seed(4)) < 0.6
    k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
    agree(clustered(), (q, k, v), features="softmax", over=over, key_valid=valid)


@pytest.mark.parametrize(("head_dim", "features"), [(24, "softmax"), (72, "elu"), (160, "relu")])
def test_head_dims_that_are_no_power_of_two(head_dim: int, features: str) -> None:
    agree(uniform(), qkv(head_dim, 1, 1, Q, K, head_dim), features=features, over="marginal")


@pytest.mark.parametrize(("scale", "features"), [(1.0, "relu"), (4.0, "elu"), (16.0, "softmax"), (16.0, "elu")])
def test_gradients_of_large_inputs(features: str, scale: float) -> None:
    inputs = tuple(scale * x for x in qkv(5, 1, 1, Q, K, 16))
    found, exact = (
        results(uniform(), impl, tuple(x.to(dtype) for x in inputs), features=features, over="complement")
        for impl, dtype in (("triton", torch.float32), ("torch", torch.float64))
    )
    for single, double in zip(found[2:], exact[2:], strict=True):
        assert (single.double() - double).norm() <= 1e-4 * double.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_its_own_type(dtype: torch.dtype) -> None:
    agree(uniform(1), qkv(6, 1, 1, Q, K, 32, dtype), 1e-2, features="softmax", over="marginal")


def test_all_keys_in_more_than_one_stretch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falloff.kernels.triton_linear.CHUNK", 24)
    agree(uniform(), qkv(7, 1, 1, Q, K, 16), features="elu", over="all")


def test_a_few_heads_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, settings = qkv(8, 1, 2, Q, K, 16), {"features": "relu", "over": "marginal"}
    together = results(uniform(2), "triton", inputs, **settings)
    monkeypatch.setattr("falloff.kernels.triton_linear.WORKING_BYTES", 1)
    for one, all_ in zip(results(uniform(2), "triton", inputs, **settings), together, strict=True):
        torch.testing.assert_close(one, all_)


def test_the_same_bits_every_time() -> None:
    inputs, settings = qkv(9, 1, 1, Q, K, 16), {"features": "softmax", "over": "marginal"}
    first, second = (results(uniform(), "triton", inputs, **settings) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_gradient_of_one_tensor_alone() -> None:
    q, k, v = qkv(10, 1, 1, Q, K, 16)
    for which, name in enumerate("qkv"):
        leaves = [x.clone().requires_grad_(number == which) for number, x in enumerate((q, k, v))]
        gradients = []
        for impl in ("triton", "torch"):
            out, _ = linear_attention(uniform(), *leaves, impl=impl, features="softmax", over="marginal")
            gradients.append(torch.autograd.grad(out.square().sum(), leaves[which])[0])
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5, msg=lambda told, name=name: f"{name}: {told}")


def test_a_slice_of_a_larger_tensor() -> None:
    wide = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv(11, 1, 2, Q, K, 16)]
    agree(uniform(2), tuple(wide), features="softmax", over="marginal")


def test_what_it_cannot_run_is_refused_when_it_is_named() -> None:
    plan, inputs = uniform(), qkv(12, 1, 1, Q, K, 16)
    shares = torch.ones(plan.blocks.shape)
    with pytest.raises(UnsupportedError, match="'triton' cannot run this call: it sums whole blocks, not shares"):
        linear_attention(plan, *inputs, impl="triton", features="softmax", over=shares)
    double = [x.double() for x in inputs]
    with pytest.raises(UnsupportedError, match="'triton' cannot run this call: it computes in float32 at most"):
        linear_attention(plan, *double, impl="triton", features="softmax", over="all")


@pytest.mark.parametrize(
    ("features", "over", "block"), [("softmax", "marginal", 32), ("elu", "complement", None), ("relu", "all", 32)]
)
def test_they_pass_the_trial_that_they_have_on_a_gpu(features, over, block):
    trial = Trial(torch.device("cpu"), torch.float16, 32, block, block, grad=True)
    assert linear._fault(trial, features, over) is None


def test_compiled_kernels_that_are_wrong_are_refused(monkeypatch):
    """As on a GPU, where a compiler made them."""
    for name in ("absent", "refuse_tensors", "interpreting"):
        monkeypatch.setattr(linear.triton, name, lambda *tensors: None)
    settings = {"features": "relu", "over": "all", "impl": "triton"}
    inputs = qkv(3, 1, 1, Q, K, 48)
    expected = results(uniform(), "torch", inputs, features="relu", over="all")[0]
    right = linear_attention(uniform(), *inputs, **settings)[0]
    torch.testing.assert_close(right, expected, rtol=1e-5, atol=1e-5)
    kernels = linear._by_triton
    monkeypatch.setattr(linear, "_by_triton", lambda *given: tuple(1.1 * part for part in kernels(*given)))
    linear._fault.cache_clear()
    with pytest.raises(UnsupportedError, match=r"'triton' cannot run this call: its output is off by 0\.1"):
        linear_attention(uniform(), *inputs, **settings)
    linear._fault.cache_clear()
