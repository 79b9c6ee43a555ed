"""What attention should have given: a float32 softmax over the kept keys, for a sample of the queries."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falloff.plan import Plan

SAMPLED = 64


@dataclass(frozen=True)
class Sample:
    """Exact rows of one call [1, H, N, D]: outputs, and gradients of the queries where asked for, [H, rows, D]."""

    rows: Tensor
    out: Tensor
    d_q: Tensor | None

    def error(self, out_BHND: Tensor) -> float:
        """Relative L2 error of an output."""
        return _relative(out_BHND[0, :, self.rows], self.out)

    def gradient_error(self, d_q_BHND: Tensor) -> float:
        """Relative L2 error of a gradient of the queries."""
        assert self.d_q is not None
        return _relative(d_q_BHND[0, :, self.rows], self.d_q)


def sample(plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, d_out_BHND: Tensor | None = None) -> Sample:
    """Evenly spaced queries of a call with batch size 1, head by head, so that memory stays small."""
    rows = torch.linspace(0, plan.q_len - 1, min(SAMPLED, plan.q_len), device=q_BHND.device).long()
    kept_HRN = plan.keys_seen(rows)[0]
    outs: list[Tensor] = []
    grads: list[Tensor] = []
    for head in range(q_BHND.shape[1]):
        q = q_BHND[0, head, rows].detach().float().requires_grad_(d_out_BHND is not None)
        k, v = (x[0, head].detach().float() for x in (k_BHND, v_BHND))
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~kept_HRN[head % len(kept_HRN)], -torch.inf)
        out = scores.softmax(-1) @ v
        outs.append(out.detach())
        if d_out_BHND is not None:
            grads += torch.autograd.grad(out, q, d_out_BHND[0, head, rows].float())
    return Sample(rows, torch.stack(outs), torch.stack(grads) if grads else None)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected).norm() / expected.norm())
