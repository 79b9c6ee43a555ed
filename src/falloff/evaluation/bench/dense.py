"""Dense attention that a user could pick instead: every one present is a peer, the fastest is the measure."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q, k, v [B, H, N, D], of any strides but the last, to out [B, H, N, D]; scale ``D ** -0.5``."""

FORCED = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FOREIGN = {"flash-attention 3": "flash_attn_interface", "flash-attention 4": "flash_attn.cute"}
"""Modules with a ``flash_attn_func`` over [B, N, H, D]."""


def peers(device: torch.device) -> tuple[dict[str, Attend], dict[str, str]]:
    """Dense attention by name, and why others are absent.

    On a CPU torch has one; on a GPU each of torch's is a peer of its own besides torch's own pick, because that is
    not always the fastest.
    """
    able: dict[str, Attend] = {"sdpa": lambda q, k, v: F.scaled_dot_product_attention(q, k, v)}
    absent: dict[str, str] = {}
    if device.type == "cpu":
        return able, absent
    able |= {name: _forced(backend) for name, backend in FORCED.items()}
    for name, module in FOREIGN.items():
        try:
            able[name] = _foreign(module)
        except (ImportError, OSError, AttributeError) as error:  # OSError: a library of another CUDA or torch
            absent[name] = f"{module} cannot be imported: {error}"
    return able, absent


def _forced(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return attend


def _foreign(module: str) -> Attend:
    function: Any = importlib.import_module(module).flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = function(*(x.transpose(1, 2) for x in (q, k, v)))
        first: Tensor = out[0] if isinstance(out, tuple) else out  # some versions return the LSE besides
        return first.transpose(1, 2)

    return attend
