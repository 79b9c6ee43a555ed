"""Parallel decoding of image tokens: fewer steps for autoregressive models.

Names are loaded when first asked for: orders and sizes need no pipeline library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from falloff.decoding.order import Locality, make_orders
    from falloff.decoding.pipeline import LPDPipeline
    from falloff.decoding.sampling import Guidance, Sampler
    from falloff.decoding.sizes import cosine_sizes, group_sizes
    from falloff.decoding.steps import decode
    from falloff.decoding.tokenizer import VQTokenizer
    from falloff.decoding.transformer import LPDTransformer

__all__ = [
    "Guidance",
    "LPDPipeline",
    "LPDTransformer",
    "Locality",
    "Sampler",
    "VQTokenizer",
    "cosine_sizes",
    "decode",
    "group_sizes",
    "make_orders",
]

_HOME = {
    "cosine_sizes": "sizes",
    "decode": "steps",
    "group_sizes": "sizes",
    "Guidance": "sampling",
    "Locality": "order",
    "LPDPipeline": "pipeline",
    "LPDTransformer": "transformer",
    "make_orders": "order",
    "Sampler": "sampling",
    "VQTokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    return value


def __dir__() -> list[str]:
    return __all__
