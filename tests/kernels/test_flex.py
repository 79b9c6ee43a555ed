"""FlexAttention as PyTorch compiles it on this machine; one compilation serves them all."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature

import pytest
import torch
from kernel_cases import qkv, random_map, uniform_plan

from falloff.kernels import UnsupportedError, attend, choose, run
from falloff.kernels.vendor import flex
from falloff.plan import BlockMap, Plan

HEADS, DIM, BLOCK = 2, 64, 128
here = pytest.mark.skipif(flex.absent() is not None, reason=str(flex.absent()))


def call(seed: int, q_len: int, kv_len: int, **more: object) -> tuple[Plan, list[torch.Tensor]]:
    blocks = random_map(seed, HEADS, -(-q_len // BLOCK), -(-kv_len // BLOCK), density=0.5)
    return replace(uniform_plan(blocks, q_len, kv_len, BLOCK), **more), list(
        qkv(seed, 1, HEADS, q_len, kv_len, DIM, torch.float32)
    )


def agrees(plan: Plan, inputs: list[torch.Tensor]) -> torch.Tensor:
    out = attend(plan, *inputs, impl="flex")
    torch.testing.assert_close(out, run(plan, *inputs, impl="reference")[0], atol=2e-6, rtol=2e-6)
    return out


@here
def test_more_lengths_than_the_compiler_keeps_stay_sparse() -> None:
    for n in range(12):
        agrees(*call(n, 130 + 37 * n, 140 + 29 * n))


@here
def test_a_new_map_of_the_same_shape_changes_the_output() -> None:
    plan, inputs = call(20, 500, 400)
    other = replace(plan, blocks=BlockMap.from_dense(~plan.blocks.dense()))
    assert not torch.allclose(agrees(plan, inputs), agrees(other, inputs))


@here
def test_orders_of_each_head_and_queries_that_see_nothing() -> None:
    generator = torch.Generator().manual_seed(1)
    q_order, kv_order = (torch.rand(1, HEADS, n, generator=generator).argsort(-1) for n in (300, 450))
    plan, inputs = call(21, 300, 450, q_order=q_order, kv_order=kv_order[:, :1])
    blocks = plan.blocks.dense()
    blocks[:, 0, 1] = False
    agrees(replace(plan, blocks=BlockMap.from_dense(blocks)), inputs)


@here
def test_it_refuses_what_it_cannot_do_on_a_cpu() -> None:
    plan, (q, k, v) = call(22, 300, 300)
    for wrong, message in (
        (lambda: run(plan, q, k, v, impl="flex"), "no LSE"),
        (lambda: attend(plan, q.clone().requires_grad_(), k, v, impl="flex"), "no backward"),
        (lambda: attend(plan, q.double(), k.double(), v.double(), impl="flex"), "does not compute in torch.float64"),
        (lambda: attend(plan, q, k, v, key_valid=torch.ones(1, 300, dtype=torch.bool), impl="flex"), "cannot drop"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            wrong()
    varying = replace(plan, q_sizes=torch.tensor([100, 0, 200]))
    with pytest.raises(UnsupportedError, match="the plan's vary"):
        attend(varying, q, k, v, impl="flex")


@here
def test_it_never_runs_uncompiled() -> None:
    plan, inputs = call(23, 300, 300)
    agrees(plan, inputs)
    with torch.compiler.set_stance("force_eager"), pytest.raises(UnsupportedError, match="switched off"):
        attend(plan, *inputs, impl="flex")


@pytest.mark.skipif("isolate_recompiles" not in signature(torch.compile).parameters, reason="PyTorch is too old")
def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan, inputs = call(24, 300, 300)
    with pytest.raises(UnsupportedError, match="no-such-compiler was not found; install one or set CXX"):
        attend(plan, *inputs, impl="flex")
    assert dict(choose(plan, inputs[0]).skipped)["flex"].startswith("by name only")


@pytest.mark.parametrize("transposed", [False, True])
def test_the_block_mask_says_what_the_map_says(transposed: bool) -> None:
    """Through PyTorch's own reading of it, on which gradients rest where the kernel has them."""
    plan, _ = call(25, 300, 450)
    mask = flex.block_mask(plan, transposed=transposed)
    blocks = plan.blocks.dense()
    assert mask.shape[-2:] == (300, 450)
    assert mask.BLOCK_SIZE == (BLOCK, BLOCK)
    assert not mask.kv_num_blocks.any()
    assert torch.equal(mask.full_kv_num_blocks, blocks.sum(-1).to(torch.int32))
    assert torch.equal(mask.to_dense().bool(), blocks)
    assert mask.kv_indices is not mask.full_kv_indices
    if transposed:
        assert torch.equal(mask.full_q_num_blocks, blocks.sum(-2).to(torch.int32))
        for h, column in torch.cartesian_prod(torch.arange(HEADS), torch.arange(4)).tolist():
            count = int(mask.full_q_num_blocks[0, h, column])
            rows = mask.full_q_indices[0, h, column, :count]
            assert sorted(rows.tolist()) == blocks[0, h, :, column].nonzero()[:, 0].tolist()
