"""Lists that neighbouring query blocks share are run once and merged; nothing else may change."""

from __future__ import annotations

import torch
from kernel_cases import qkv, random_map, uniform_plan

from falloff.kernels import run
from falloff.kernels.launch import build


def banded_map(blocks: int) -> torch.Tensor:
    """Every row sees a common third; besides, its own neighbourhood."""
    row = torch.arange(blocks)
    return ((row[:, None] - row).abs() <= 1) | (row < blocks // 3)


def test_shared_keys_are_listed_apart_and_the_answers_agree() -> None:
    plan = uniform_plan(banded_map(24), 93, 93, 4)
    parts = [chunk.merge for chunk in build(plan, 1, 2).chunks]
    assert True in parts
    assert False in parts
    q, k, v = (x.requires_grad_() for x in qkv(20, 1, 2, 93, 93, 8))
    results = {}
    for impl in ("reference", "cpu"):
        out, lse = run(plan, q, k, v, impl=impl)
        results[impl] = (
            out,
            lse,
            *torch.autograd.grad(out.square().sum(), (q, k, v), retain_graph=True),
            *torch.autograd.grad(out.sum() + lse.square().sum(), (q, k, v)),
        )
    for got, expected in zip(results["cpu"], results["reference"], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_a_map_that_shares_little_is_one_list_of_chunks() -> None:
    plan = uniform_plan(random_map(21, 24, 24, density=0.2) | torch.eye(24, dtype=torch.bool), 96, 96, 4)
    assert not any(chunk.merge for chunk in build(plan, 1, 1).chunks)
