"""Attention by shares of blocks: against kernels where they are 0 and 1, by brute force between, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trained_calls import normal, plan_of, random_classes

from falloff import Plan, kernels
from falloff.kernels import soft
from falloff.kernels.soft import soft_attention

SCALE = 3**-0.5


def call(batch: int = 2) -> tuple[Plan, Tensor, Tensor, Tensor, Tensor]:
    """A plan of ragged blocks, shares of them, and q, k, v of 10 tokens."""
    plan = plan_of(random_classes(0, 1, 2, 3, 4).clamp(min=0), 10, 10, 4, 3)
    q, k, v = (normal(i, batch, 2, 10, 3) for i in range(3))
    return plan, normal(5, batch, 2, 3, 4).sigmoid(), q, k, v


@pytest.fixture(autouse=True)
def three_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soft, "WORKING_BYTES", 3 * 3 * 8 * 10)


def test_shares_of_zero_and_one_are_the_plan() -> None:
    plan, _, q, k, v = call()
    out = soft_attention(plan, plan.blocks.dense().double(), q, k, v, scale=SCALE)
    torch.testing.assert_close(out, kernels.attend(plan, q, k, v, impl="reference"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_shares_between_weigh_the_keys(padded: bool) -> None:
    plan, shares, q, k, v = call()
    weights = (SCALE * q @ k.mT).exp() * shares.repeat_interleave(4, 2).repeat_interleave(3, 3)[:, :, :10, :10]
    valid = None
    if padded:
        valid = torch.ones(2, 10, dtype=torch.bool)
        valid[0, 7:], valid[1, 4] = False, False
        weights = weights * valid[:, None, None]
    wanted = weights @ v / weights.sum(-1, keepdim=True)
    if valid is not None:
        k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
    torch.testing.assert_close(soft_attention(plan, shares, q, k, v, scale=SCALE, key_valid=valid), wanted)


def test_gradients_against_central_differences() -> None:
    plan, shares, *tensors = call(batch=1)
    given = [x.requires_grad_() for x in (shares, *tensors)]

    def out(shares: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return soft_attention(plan, shares, q, k, v, scale=SCALE)

    assert torch.autograd.gradcheck(out, given, atol=1e-7)


def test_a_share_of_nothing_gives_no_gradient_that_is_none() -> None:
    plan, shares, q, k, v = call()
    shares = (shares * torch.tensor([0.0, 1, 1, 1], dtype=torch.float64)).requires_grad_()
    (gradient,) = torch.autograd.grad(soft_attention(plan, shares, q, k, v, scale=SCALE).sum(), shares)
    assert bool(gradient.isfinite().all())
    assert not bool(gradient[..., 0].any())
    assert bool(gradient[..., 1:].any())
