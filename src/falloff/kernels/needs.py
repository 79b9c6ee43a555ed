"""What a call asks of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falloff.plan import Plan


@dataclass(frozen=True, eq=False)
class Needs:
    """A plan, its queries [B, H, Nq, D], and whether gradients, an exact LSE and ``key_valid`` are wanted."""

    plan: Plan
    q_BHND: Tensor
    grad: bool = False
    lse: bool = True
    drops_keys: bool = False


def differentiable(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked of what is computed from these tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
