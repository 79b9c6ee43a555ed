"""Decoding by steps that all have one shape, for a compiler and CUDA graphs.

A step has few rows, so that starting its kernels takes longer than running them. Here tokens and queries are padded to
the largest group, the cache has its final length, and what is real is a matter of tensors: one graph serves all steps
of all images. The class is a row of every step, and comes out the same every time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from falloff.decoding.cache import Cache
from falloff.decoding.transformer import LPDTransformer


class StaticSteps:
    """Compiled steps of a model, with a cache that stays where it is. ``options`` are those of ``torch.compile``."""

    def __init__(self, model: LPDTransformer, **options: Any) -> None:
        self._model = model
        self._step = torch.compile(padded_step, fullgraph=True, dynamic=False, **options)
        self._caches: dict[tuple[int, torch.device, torch.dtype], Cache] = {}

    def begin(self, batch: int, device: torch.device) -> Cache:
        """The cache of the next images; nothing of the last ones is seen."""
        key = (batch, device, self._model.dtype)
        if key not in self._caches:
            # The place behind the last token is for what padding leaves.
            made = self._caches[key] = Cache(self._model, batch, device, spare=1)
            for part in (made.keys, made.values):
                torch._dynamo.mark_static_address(part)  # CUDA graphs write to where it was when they were recorded
        cache = self._caches[key]
        cache.filled = 0
        return cache

    def __call__(
        self, cache: Cache, labels_B: Tensor, tokens_BP: Tensor, cells_BP: Tensor, asked_BG: Tensor, width: int
    ) -> Tensor:
        """Encode tokens into the cache, and the class if it is not there; logits of the cells asked for.

        ``width``: tokens of the largest group. The logits are valid until the next step.
        """
        start, new, asked = max(1, cache.filled), tokens_BP.shape[1], asked_BG.shape[1]
        # filled on the device: a copy to it would wait for all steps before
        counts = [torch.full((), count, device=labels_B.device) for count in (start, new, asked)]
        tokens, cells = (pad(part, (0, width - new)) for part in (tokens_BP, cells_BP))
        torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]  # PyTorch left it untyped
        logits: Tensor = self._step(
            self._model, cache.keys, cache.values, labels_B, tokens, cells, pad(asked_BG, (0, width - asked)), *counts
        )
        cache.filled = start + new
        return logits[:, :asked]


def padded_step(
    model: LPDTransformer,
    keys: Tensor,
    values: Tensor,
    labels_B: Tensor,
    tokens_BW: Tensor,
    cells_BW: Tensor,
    asked_BW: Tensor,
    start: Tensor,
    new: Tensor,
    asked: Tensor,
) -> Tensor:
    """Logits of ``asked_BW``. ``start``: the first token's slot; ``new``, ``asked``: how many tokens and queries are
    real, each an int64 of no dimensions.
    """
    width, last = tokens_BW.shape[1], keys.shape[3] - 1
    place = torch.arange(width, device=keys.device)
    slots = torch.cat([torch.zeros_like(place[:1]), torch.where(place < new, start + place, last)])
    seen = _seen(start + new, asked, width, keys.shape[3])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys[layer].index_copy_(2, slots, k[:, :, : 1 + width])
        values[layer].index_copy_(2, slots, v[:, :, : 1 + width])
        all_keys = torch.cat([keys[layer], k[:, :, 1 + width :]], dim=2)
        all_values = torch.cat([values[layer], v[:, :, 1 + width :]], dim=2)
        return sdpa(q, all_keys, all_values, attn_mask=seen)

    out: Tensor = model(labels_B, tokens_BW, cells_BW, asked_BW, attend)
    return out


def _seen(end: Tensor, asked: Tensor, width: int, slots: int) -> Tensor:
    """Who sees what, boolean [1 + 2 width, slots + width]: rows are class, tokens, queries; columns slots, queries."""
    row = torch.arange(1 + 2 * width, device=end.device)[:, None]
    slot, query = torch.arange(slots, device=end.device), torch.arange(width, device=end.device)
    of_cache = slot < torch.where(row == 0, 1, end)
    of_queries = (row > width) & (query < asked)
    return torch.cat([of_cache, of_queries], dim=1)
