"""A top-k that a gradient passes, for training what makes the scores (SLA2, arXiv:2602.12675, first stage)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

STEPS = 60
"""Halvings of the interval that holds the threshold: below the rounding of float64 at any scores of use."""
REACH = 40.0
"""Beyond this a sigmoid is 0 or 1 in float64."""


def soft_topk(score: Tensor, count: int, *, tau: float = 0.1) -> Tensor:
    """Soft marks of the ``count`` highest of every row of scores [..., K], in (0, 1), that sum to ``count``.

    ``m_j = sigmoid(s_j / tau + lambda)``, lambda found by bisection; a lower ``tau`` is harder. Its Jacobian is
    ``(diag(g) - g g^T / sum g) / tau`` with ``g = m (1 - m)``. All ones where a row has no more than ``count``.
    Raises ``ValueError`` for a count below 1 and a tau of 0 or less.
    """
    if count < 1:
        raise ValueError(f"count = {count} must be at least 1")
    if tau <= 0:
        raise ValueError(f"tau = {tau} must be above 0")
    if count >= score.shape[-1]:
        return torch.ones_like(score)
    marks: Tensor = _SoftTopk.apply(score, count, tau)  # type: ignore[no-untyped-call]  # torch's
    return marks


class _SoftTopk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, score: Tensor, count: int, tau: float) -> Tensor:
        scaled = score / tau
        low = -REACH - scaled.amax(-1, keepdim=True)
        high = REACH - scaled.amin(-1, keepdim=True)
        for _ in range(STEPS):
            middle = (low + high) / 2
            too_many = (scaled + middle).sigmoid().sum(-1, keepdim=True) > count
            low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
        marks = (scaled + (low + high) / 2).sigmoid()
        ctx.save_for_backward(marks)
        ctx.tau = tau
        return marks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (marks,) = ctx.saved_tensors
        slope = marks * (1 - marks)
        total = slope.sum(-1, keepdim=True).clamp(min=torch.finfo(slope.dtype).tiny)
        mean = (slope * grads[0]).sum(-1, keepdim=True) / total
        return slope * (grads[0] - mean) / ctx.tau, None, None
