"""Autocast reaches the calls that falloff computes as it reaches PyTorch's attention."""

from __future__ import annotations

import torch
from torch import Tensor


def cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys and values in autocast's type where it is on; float64 as it is, which autocast leaves alone."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # which knows no meta tensors
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
