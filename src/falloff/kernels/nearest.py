"""One step of k-means on a CPU in C++ (simd/nearest.cpp): scores never leave a core's cache, or are ever written."""

from __future__ import annotations

from ctypes import Structure, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from falloff.kernels import compiled

SOURCE = Path(__file__).parent / "simd" / "nearest.cpp"


class Assigned(NamedTuple):
    """``labels`` int32 [H, N]; of every center the sum of its tokens [H, C, D] and their number int64 [H, C].

    ``finite``: whether all scores were, 0-d bool; the rest means nothing where they were not.
    """

    labels: Tensor
    sums: Tensor
    sizes: Tensor
    finite: Tensor


def runs(x_HND: Tensor) -> bool:
    """Whether tokens can be assigned here."""
    return compiled.runs(SOURCE, x_HND)


def assign(x_HND: Tensor, offset_HCD: Tensor, bias_HC: Tensor) -> Assigned:
    """Every token's center of the highest ``x . offset - bias``, ties to the first; one head by one thread."""
    x = x_HND if x_HND.stride(2) == 1 else x_HND.contiguous()
    offset, bias = offset_HCD.contiguous(), bias_HC.contiguous()
    (heads, tokens, channels), centers = x.shape, offset.shape[1]
    found = Assigned(
        torch.empty(heads, tokens, dtype=torch.int32),
        torch.zeros_like(offset),
        torch.zeros(heads, centers, dtype=torch.int64),
        torch.empty(heads, dtype=torch.bool),
    )
    call = _Clustering(x.data_ptr(), *x.stride()[:2], heads, tokens, channels, centers)
    call.threads = min(heads, compiled.threads(x.numel() * centers))
    call.offset, call.bias = offset.data_ptr(), bias.data_ptr()
    call.label, call.sums, call.sizes, call.finite = (part.data_ptr() for part in found)
    compiled.call(SOURCE, "falloff_nearest", call)
    return found._replace(finite=found.finite.all())


class _Clustering(Structure):
    """As in the C++."""

    _fields_ = (
        ("tokens", c_void_p),
        *((name, c_int64) for name in ("head", "token", "heads", "count", "channels", "centers", "threads")),
        *((name, c_void_p) for name in ("offset", "bias", "label", "sums", "sizes", "finite")),
    )
