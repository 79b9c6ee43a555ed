"""Products of half-precision matrices whose sums are not rounded to half precision."""

from __future__ import annotations

import torch
from torch import Tensor

_WIDENS = hasattr(torch.ops.aten.bmm, "dtype")
"""Whether this PyTorch multiplies half precision on CUDA into float32; it can since 2.8."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of [n, m, l] and [n, l, o] of one dtype, summed and given in float32 at least."""
    if a.is_cuda and _WIDENS and a.dtype in (torch.bfloat16, torch.float16) and not torch.is_grad_enabled():
        return torch.bmm(a, b, out_dtype=torch.float32)
    exact = torch.promote_types(a.dtype, torch.float32)
    return a.to(exact) @ b.to(exact)
