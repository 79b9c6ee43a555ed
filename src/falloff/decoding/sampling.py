"""From logits to tokens: guidance, and draws under passed generators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for all images, or one for each image, which then does not depend on its company."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """l = l_u + s_n (l_c - l_u), written l_c + (s_n - 1)(l_c - l_u), which is exactly l_c at s_n = 1.

    ``linear``: s_n = 1 + (scale - 1) n / N for the token at place n of N in the order, which differs within a group;
    ``constant``: s_n = scale.
    """

    scale: float = 1.0
    schedule: Literal["linear", "constant"] = "linear"

    def __post_init__(self) -> None:
        if self.scale < 0:
            raise ValueError(f"guidance scale = {self.scale} is negative; 1 is no guidance, use 0 or more")
        if self.schedule not in ("linear", "constant"):
            raise ValueError(f"guidance schedule = {self.schedule!r} must be linear or constant")

    def scales(self, tokens: int) -> Tensor:
        """s_n, float32 [tokens]."""
        if self.schedule == "constant":
            return torch.full((tokens,), float(self.scale))
        return 1 + (self.scale - 1) * torch.arange(tokens) / tokens


def guided(cond_BGV: Tensor, uncond_BGV: Tensor, scales_G: Tensor) -> Tensor:
    """Guided logits in float32."""
    cond = cond_BGV.float()
    return cond + (scales_G[:, None] - 1) * (cond - uncond_BGV.float())


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """temperature: 0 takes the likeliest token. top_k: draw among this many likeliest; 0 is all of them.
    top_p: draw among the likeliest tokens that together have this probability.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature = {self.temperature} is negative; 0 takes the likeliest token")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} is negative; 0 draws among all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} is outside 0 (excluded) to 1")

    def __call__(self, logits_BGV: Tensor, generator: Generators) -> Tensor:
        """One token of each row, int64 [B, G]."""
        if self.temperature == 0:
            return logits_BGV.argmax(dim=-1)
        kept = self._kept(logits_BGV.float() / self.temperature)
        # Dividing by exponential noise and taking the largest is a categorical draw, without a sync of the device.
        noise = exponential(tuple(kept.shape), generator, kept.device)
        return (kept.softmax(dim=-1) / noise).argmax(dim=-1)

    def _kept(self, logits: Tensor) -> Tensor:
        if 0 < self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p < 1:
            ranked, places = logits.sort(dim=-1, descending=True)
            probabilities = ranked.softmax(dim=-1)
            # A token is dropped when those before it have the probability already: the first always stays.
            surplus = probabilities.cumsum(dim=-1) - probabilities >= self.top_p
            dropped = torch.zeros_like(surplus).scatter_(-1, places, surplus)
            logits = logits.masked_fill(dropped, -torch.inf)
        return logits


def exponential(shape: tuple[int, ...], generator: Generators, device: torch.device) -> Tensor:
    """Exponential noise [B, ...], drawn on each generator's own device: the same picture on every device."""
    if isinstance(generator, Sequence):
        return torch.cat([exponential((1, *shape[1:]), one, device) for one in generator])
    source = generator.device if generator is not None else device
    return torch.empty(shape, device=source).exponential_(generator=generator).to(device)
