"""Keys and values of what has been decoded."""

from __future__ import annotations

import torch

from falloff.decoding.transformer import LPDTransformer


class Cache:
    """Of the class and of the tokens decoded so far: [layers, B, H, N + 1, D] each, and ``spare`` slots behind."""

    def __init__(self, model: LPDTransformer, batch: int, device: torch.device, spare: int = 0) -> None:
        config = model.config
        head = config.width // config.heads
        shape = (config.layers, batch, config.heads, 1 + model.tokens + spare, head)
        self.keys = torch.zeros(shape, dtype=model.dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.filled = 0
