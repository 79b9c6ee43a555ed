"""The soft top-k: what its marks sum to, what they become when they harden, and its Jacobian."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from falloff.methods.select import topk
from falloff.methods.soft_topk import soft_topk


def scores(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    blocks=st.integers(2, 40),
    part=st.floats(0.01, 0.99),
    tau=st.sampled_from([0.01, 0.1, 1.0]),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
)
def test_marks_sum_to_the_count(seed: int, blocks: int, part: float, tau: float, scale: float) -> None:
    count = max(1, int(part * blocks))
    score = scale * scores(seed, 2, 3, blocks)
    marks = soft_topk(score, count, tau=tau)
    torch.testing.assert_close(marks.sum(-1), torch.full((2, 3), float(count), dtype=torch.float64))
    assert ((marks >= 0) & (marks <= 1)).all()
    order = score.argsort(-1)
    assert (marks.gather(-1, order).diff(dim=-1) >= 0).all()


def test_a_low_tau_is_the_hard_choice() -> None:
    score = scores(0, 4, 9)
    torch.testing.assert_close(soft_topk(score, 3, tau=1e-4), topk(score, 3).double(), atol=1e-6, rtol=0)


def test_equal_scores_share_evenly() -> None:
    torch.testing.assert_close(soft_topk(torch.zeros(2, 8), 2), torch.full((2, 8), 0.25))


@pytest.mark.parametrize("tau", [0.1, 0.7])
def test_its_jacobian(tau: float) -> None:
    score = scores(1, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, 2, tau=tau), [score], eps=1e-7, atol=1e-6)
    marks = soft_topk(score.detach(), 2, tau=tau)
    g = marks * (1 - marks)
    expected = (g.diag() - g[:, None] * g / g.sum()) / tau
    torch.testing.assert_close(torch.autograd.functional.jacobian(lambda s: soft_topk(s, 2, tau=tau), score), expected)


def test_single_precision_is_as_good() -> None:
    score = scores(2, 3, 30)
    torch.testing.assert_close(soft_topk(score.float(), 7).double(), soft_topk(score, 7), atol=1e-5, rtol=0)


def test_all_of_a_short_row() -> None:
    score = scores(3, 2, 4).requires_grad_()
    assert torch.equal(soft_topk(score, 4), torch.ones(2, 4, dtype=torch.float64))


def test_what_is_not_legal() -> None:
    with pytest.raises(ValueError, match="count = 0 must be at least 1"):
        soft_topk(torch.zeros(3), 0)
    with pytest.raises(ValueError, match="tau = 0 must be above 0"):
        soft_topk(torch.zeros(3), 1, tau=0)
