"""The shape of an attention module: what parameters of a method's own are made for."""

from __future__ import annotations

from typing import Any

import torch

from falloff.hosts import UnsupportedModelError
from falloff.methods.branch import Layer

PROJECTIONS = ("to_q", "to_query", "to_qkv_mlp_proj")
"""Where the families keep the layer that makes queries, alone or with others."""


def layer_of(path: str, attn: Any) -> tuple[Layer, torch.device]:
    """The shape of an attention module, and the device of its weights; the CPU for weights that are elsewhere.

    Raises ``UnsupportedModelError`` when the module does not tell.
    """
    heads = getattr(attn, "heads", None) or getattr(attn, "num_heads", None)
    projection = next((found for name in PROJECTIONS if (found := getattr(attn, name, None)) is not None), None)
    width = getattr(projection, "in_features", None)
    inner = getattr(attn, "inner_dim", None) or getattr(projection, "out_features", None)
    if not heads or not width or not inner:
        raise UnsupportedModelError(
            f"{path} is a {type(attn).__name__} that does not tell its heads and channels, so that no parameters can "
            f"be made for it; falloff reads heads or num_heads, and in_features and out_features of one of "
            f"{', '.join(PROJECTIONS)}"
        )
    weight = next(attn.parameters())
    device = torch.device("cpu") if weight.device.type == "meta" else weight.device
    dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
    return Layer(heads=heads, head_dim=inner // heads, width=width, dtype=dtype), device
