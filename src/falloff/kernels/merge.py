"""Attention over a union of disjoint key sets, from attention over each."""

from __future__ import annotations

import torch
from torch import Tensor

Branch = tuple[Tensor, Tensor]


def merge(first: Branch, second: Branch) -> Branch:
    """Combine (out [B, H, N, D], lse [B, H, N]) of two disjoint key sets: the result over both.

    ``lse = log(exp(lse1) + exp(lse2))`` and ``out = sum_i exp(lse_i - lse) out_i``, in the LSE's precision. A
    query that sees nothing in either (both -inf) gives 0 and -inf. Differentiable in all four.
    """
    (out1, lse1), (out2, lse2) = first, second
    top = torch.maximum(lse1, lse2).detach()  # cancels in the result, so it needs no gradient
    top = top.masked_fill(top == -torch.inf, 0)
    weight1, weight2 = (lse1 - top).exp(), (lse2 - top).exp()
    total = weight1 + weight2
    empty = total == 0
    total = total.masked_fill(empty, 1)
    out = (weight1 / total)[..., None] * out1 + (weight2 / total)[..., None] * out2
    return out.to(out1.dtype), (top + total.log()).masked_fill(empty, -torch.inf)
