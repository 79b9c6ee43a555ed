"""XAttention (arXiv:2503.16428): blocks scored by the antidiagonals of the attention matrix.

Queries and keys are taken in groups of S tokens, and a pair of groups (a, b) is scored by the mean over the
antidiagonal of its S x S square of logits, which meets every vertical and every slanted line that crosses it:

    Z_ab = sum_{s < S} q[a S + S - 1 - s] . k[b S + s] / (S sqrt(d)).

A block's mass is the sum of softmax_b(Z) over its pairs of groups, and a row of blocks keeps the fewest blocks whose
mass is at least ``tau`` of the row's. Costs 1 / (2 S) of the products of dense attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import Prediction, check_count, check_share, predicted
from falloff.methods.select import mass_ge
from falloff.plan import Plan

SCORES = 1 << 22
"""Scores of groups held at once: 16 MiB in float32, and as much again for their softmax."""


@dataclass(frozen=True, kw_only=True)
class XAttention(Method):
    """XAttention over the video's tokens, in raster order; text is seen by all and sees all.

    tau: share of a row's mass to keep, above 0 and at most 1; or one share for each head.
    stride: tokens of a group, a divisor of the block. A last group that would be shorter is made of the last
        ``stride`` tokens, and weighs as much as its own tokens.
    block: tokens of a block.
    """

    name: ClassVar[str] = "xattention"
    dial: ClassVar[str | None] = "tau"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "tau": Span(0.3, 0.98),
        "stride": Choices((4, 8, 16)),
        "block": Choices((32, 64, 128)),
    }

    tau: float | tuple[float, ...] = 0.9
    stride: int = 8
    block: int = 128

    def __post_init__(self) -> None:
        check_count("block", self.block)
        check_count("stride", self.stride)
        if isinstance(self.tau, tuple | list):
            object.__setattr__(self, "tau", tuple(self.tau))
        for share in self._shares():
            check_share("tau", share)
        if self.block % self.stride:
            raise ValueError(f"stride = {self.stride} must divide the block of {self.block} tokens")

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        shares, first, heads = self._shares(), call.first_head, q_BHND.shape[1]
        if len(shares) > 1:
            if len(shares) % heads or len(shares) < first + heads:  # processes may share the heads evenly
                raise ValueError(f"tau has {len(shares)} shares for {heads} heads; give one, or one for each")
            shares = shares[first : first + heads]
        share = torch.tensor(shares, device=q_BHND.device).view(-1, 1, 1)
        return predicted(
            call.sequence,
            self.block,
            self.block,
            q_BHND,
            k_BHND,
            lambda q, k, some: Prediction(
                mass_ge(antidiagonal_mass(q, k, self.stride, self.block), share[some] if len(share) > 1 else share)
            ),
        )

    def _shares(self) -> tuple[float, ...]:
        return self.tau if isinstance(self.tau, tuple) else (self.tau,)


def antidiagonal_mass(q_BHND: Tensor, k_BHND: Tensor, stride: int, block: int) -> Tensor:
    """The estimated attention mass of every pair of blocks, [B, H, T, T] in float32 at least.

    A row of blocks sums to its number of groups, one of fewer tokens counting as much less.
    """
    batch, heads, tokens, channels = q_BHND.shape
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    if tokens <= block:
        return torch.ones(batch, heads, 1, 1, dtype=exact, device=q_BHND.device)
    scale = channels**-0.5 / stride  # before the product, which float16 might not hold otherwise
    q_BHCG = _groups(q_BHND, stride).flip(3).flatten(3) * scale
    k_BHCG = _groups(k_BHND, stride).flatten(3)
    starts = torch.arange(0, tokens, stride, device=q_BHND.device)
    weight_C = (tokens - starts).clamp(max=stride).to(exact) / stride
    side = block // stride
    rows = side * max(1, SCORES // (batch * heads * len(weight_C) * side))
    masses = []
    for q, weight in zip(torch.split(q_BHCG, rows, 2), torch.split(weight_C, rows), strict=True):
        scores = (q @ k_BHCG.mT).to(exact) + weight_C.log()
        masses.append(_tile_sums(scores.softmax(-1) * weight[:, None], side))
    return torch.cat(masses, 2)


def _groups(x_BHND: Tensor, stride: int) -> Tensor:
    """Consecutive groups of ``stride`` tokens, the last one ending with the last token: [B, H, C, stride, D]."""
    batch, heads, tokens, channels = x_BHND.shape
    whole = tokens // stride * stride
    groups = x_BHND[:, :, :whole].reshape(batch, heads, -1, stride, channels)
    if whole == tokens:
        return groups
    return torch.cat([groups, x_BHND[:, :, None, -stride:]], 2)


def _tile_sums(x_BHRC: Tensor, side: int) -> Tensor:
    """Sums over side x side tiles; those at the far ends may be smaller."""
    batch, heads, rows, columns = x_BHRC.shape
    x = F.pad(x_BHRC, (0, -columns % side, 0, -rows % side))
    tiles = x.view(batch, heads, -(-rows // side), side, -(-columns // side), side)
    return tiles.sum((3, 5))
