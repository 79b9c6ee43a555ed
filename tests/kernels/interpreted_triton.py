"""The Triton kernel's own paths, on the CPU: run by test_triton.py in a process with TRITON_INTERPRET=1."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_cases import qkv, random_map, tensors, uniform_plan
from torch import Tensor

from falloff.kernels import proof, run
from falloff.kernels.choose import kernel_named
from falloff.kernels.trial import Trial
from falloff.plan import BlockMap, Plan


def results(
    plan: Plan, impl: str, inputs: tuple[Tensor, ...], key_valid: Tensor | None = None, scale: float | None = None
) -> tuple[Tensor, ...]:
    """Out, LSE and the gradients of a random weighting of both."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    out, lse = run(plan, *leaves, impl=impl, key_valid=key_valid, scale=scale)
    generator = torch.Generator().manual_seed(9)
    d_out, d_lse = tensors(generator, *out.shape), tensors(generator, *lse.shape)
    loss = (out.float() * d_out).sum() + (lse.masked_fill(lse.isinf(), 0) * d_lse).sum()
    return out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)


def agree(plan: Plan, inputs: tuple[Tensor, ...], tolerance: float = 1e-5, **settings) -> None:
    exact = results(plan, "reference", tuple(x.float() for x in inputs), **settings)
    for got, expected in zip(results(plan, "triton", inputs, **settings), exact, strict=True):
        torch.testing.assert_close(got.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("head_dim", [72, 80, 96, 256])
def test_head_dims_that_are_no_power_of_two_and_the_largest(head_dim):
    plan = uniform_plan(random_map(head_dim, 2, 2) | torch.eye(2, dtype=torch.bool), 70, 70, 64)
    agree(plan, qkv(head_dim, 1, 1, 70, 70, head_dim))


def test_float16_over_blocks_of_128_with_a_ragged_tail():
    plan = uniform_plan(random_map(1, 2, 3, density=0.6), 200, 300, 128)
    agree(plan, qkv(1, 1, 1, 200, 300, 64, torch.float16), 4e-3)


def clusters(seed: int, *lead: int) -> Tensor:
    """Sizes of 150 tokens: none, one, few, many."""
    sizes = torch.tensor([0, 1, 70, 5, 0, 33, 41])
    generator = torch.Generator().manual_seed(seed)
    turns = torch.stack([torch.randperm(7, generator=generator) for _ in range(max(1, *lead, 1))])
    return sizes[turns].view(*lead, 7) if lead else sizes


@pytest.mark.parametrize("dropped", [False, True])
def test_clusters_of_their_own_in_every_head_and_orders_of_both_sides(dropped):
    generator = torch.Generator().manual_seed(2)
    plan = Plan(
        q_len=150,
        kv_len=150,
        q_sizes=clusters(0),
        kv_sizes=clusters(1, 1, 2),
        q_order=torch.rand(1, 2, 150, generator=generator).argsort(-1),
        kv_order=torch.rand(150, generator=generator).argsort(),
        blocks=BlockMap.from_dense(random_map(3, 2, 7, 7, density=0.5)),
        partial=True,
    )
    valid = torch.rand(1, 150, generator=generator) < 0.6 if dropped else None
    agree(plan, qkv(4, 1, 2, 150, 150, 32), key_valid=valid)


def test_maps_of_a_batch_shared_by_its_heads():
    agree(uniform_plan(random_map(5, 2, 1, 2, 2, density=0.6), 40, 60, 32), qkv(5, 2, 2, 40, 60, 16))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale):
    agree(uniform_plan(random_map(6, 2, 2), 40, 40, 32), qkv(6, 1, 1, 40, 40, 16), scale=scale)


def test_the_same_bits_every_time():
    plan = uniform_plan(random_map(7, 2, 3), 70, 130, 48)
    inputs = qkv(7, 1, 1, 70, 130, 16)
    first, second = (results(plan, "triton", inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def scattered(x_BHND: Tensor, head_stride: int, token_stride: int, file: Path) -> Tensor:
    """The same numbers in a file mapped to memory, of which only the pages in use take space."""
    _, heads, tokens, width = x_BHND.shape
    elements = (heads - 1) * head_stride + (tokens - 1) * token_stride + width
    memory = torch.from_file(str(file), shared=True, size=elements, dtype=x_BHND.dtype)
    return memory.as_strided(x_BHND.shape, (elements, head_stride, token_stride, 1)).copy_(x_BHND)


@pytest.mark.parametrize("strides", [(2**31 + 64, 64), (64, 2**27)])
@pytest.mark.parametrize("packed", [False, True])
def test_offsets_beyond_two_to_the_31_elements(strides, packed, tmp_path):
    sizes = torch.tensor([17, 3]) if packed else 64
    blocks = BlockMap.from_dense(torch.ones((2, 2) if packed else (1, 1), dtype=torch.bool))
    plan = Plan(q_len=20, kv_len=20, q_sizes=sizes, kv_sizes=sizes, blocks=blocks)
    near = qkv(8, 1, 2, 20, 20, 16, torch.float16)
    far = tuple(scattered(x, *strides, tmp_path / name) for name, x in zip("qkv", near, strict=True))
    for got, expected in zip(run(plan, *far, impl="triton"), run(plan, *near, impl="triton"), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize(("block", "dtype"), [(32, torch.float32), (None, torch.float16)])
def test_it_passes_the_trial_that_it_has_on_a_gpu(block, dtype):
    trial = Trial(torch.device("cpu"), dtype, 32, block, block, own_maps=(True, True), partial=True, grad=True)
    assert proof.verdict(kernel_named("triton"), trial) is None
