"""Attention masks of models, where they say no more than which keys are valid."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_fault(mask: Tensor | None) -> str | None:
    """Why a mask is not one over keys alone, bool [B | 1, 1, 1, Nkv]; ``None`` where it is, or there is none."""
    if mask is None or (mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[1:3] == (1, 1)):
        return None
    return f"its mask, {mask.dtype} of shape {tuple(mask.shape)}, is not over keys alone"


def valid_keys(mask: Tensor | None, batch: int) -> Tensor | None:
    """The ``key_valid`` [B, Nkv] of a mask over keys alone."""
    return None if mask is None else mask[:, 0, 0].expand(batch, -1)
