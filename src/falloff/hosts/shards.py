"""Tokens that several processes have computed, in the order that plans are made for.

Each process has an even share of the text and of the grid (context parallelism). Tokens that they exchange come share
by share, [text 0, video 0, text 1, video 1, ...] where text is before; in a model's own order all text is together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shards:
    """``count`` processes; in each share the first ``lead`` tokens belong together, and so do the rest."""

    count: int
    lead: int

    def joined(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...], from share by share to the model's order."""
        shares = x_BS.unflatten(1, (self.count, -1))  # type: ignore[no-untyped-call]  # PyTorch left it untyped
        return torch.cat([shares[:, :, : self.lead].flatten(1, 2), shares[:, :, self.lead :].flatten(1, 2)], dim=1)

    def joined_mask(self, mask: Tensor | None) -> Tensor | None:
        """The same for a mask over keys, [B | 1, 1, 1, S]."""
        return None if mask is None else self.joined(mask.transpose(1, 3)).transpose(1, 3)

    def split(self, x_BS: Tensor) -> Tensor:
        """[B, S, ...], from the model's order to share by share."""
        at = self.count * self.lead
        parts = (part.unflatten(1, (self.count, -1)) for part in (x_BS[:, :at], x_BS[:, at:]))  # type: ignore[no-untyped-call]  # as above
        return torch.cat(list(parts), dim=2).flatten(1, 2)


def shards_of(count: int, tokens: int, grid: int, text_side: Literal["after", "before"]) -> Shards:
    """How ``tokens``, of which ``grid`` are the grid's, lie in the shares of ``count`` processes.

    Raises ``ValueError`` when text or grid have no even shares.
    """
    text = tokens - grid
    if text < 0 or text % count or grid % count:
        raise ValueError(
            f"{tokens} tokens with {grid} of a grid are no even shares of {count} processes; choose a size and a text "
            "length that ulysses_degree divides"
        )
    return Shards(count, (text if text_side == "before" else grid) // count)
