"""HyperAttention (arXiv:2310.05869): queries and keys sorted by angle, each block seeing the block of its own place.

A token's bucket is the signs of its products with ``projections`` random vectors, and buckets are counted along a
Gray code, so that neighbours differ in one sign. Queries and keys are stably sorted by bucket, each by their own; a
block of queries sees the block of keys at the same place of the sorted sequence, and ``block`` keys taken evenly from
the whole video. The paper lets those keys also stand for all that is left out, by a weight on each; here they count
for themselves, so that the output is attention over the keys a query sees, as for every other method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import Prediction, check_count, predicted
from falloff.plan import Plan

MOST_PROJECTIONS = 16


@dataclass(frozen=True, kw_only=True)
class Hyper(Method):
    """HyperAttention's sorted blocks and samples over the video's tokens; text is seen by all and sees all.

    projections: signs of a bucket, 1 to 16; 7 are 128 buckets.
    block: tokens of a block, and keys sampled.
    seed: of the random vectors, which are the same for every head, layer and step.
    """

    name: ClassVar[str] = "hyper"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "projections": Span(3, 10),
        "block": Choices((64, 128, 256, 512)),
    }

    projections: int = 7
    block: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("projections", self.projections, "signs")
        if self.projections > MOST_PROJECTIONS:
            raise ValueError(f"projections = {self.projections} must be at most {MOST_PROJECTIONS}")
        check_count("block", self.block)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed = {self.seed!r} must be a whole number of at least 0")

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        return predicted(call.sequence, self.block, self.block, q_BHND, k_BHND, self._predict)

    def _predict(self, q_BHND: Tensor, k_BHND: Tensor, _: slice) -> Prediction:
        directions_DP = torch.randn(
            q_BHND.shape[3], self.projections, generator=torch.Generator().manual_seed(self.seed)
        ).to(q_BHND)
        q_order = _buckets(q_BHND, directions_DP).argsort(dim=-1, stable=True)
        bucket = _buckets(k_BHND, directions_DP)
        sampled = _evenly(k_BHND.shape[2], self.block, k_BHND.device)
        bucket[..., sampled] = -1  # to the front, where they are the first block
        kv_order = bucket.argsort(dim=-1, stable=True)
        on = _map(q_BHND.shape[2], k_BHND.shape[2], self.block, q_BHND.device)
        return Prediction(on.expand(*q_order.shape[:2], -1, -1), q_order, kv_order)


def gray_rank(code: Tensor) -> Tensor:
    """The place of a code of at most 16 bits along the Gray code: ``rank ^ (rank >> 1) == code``."""
    for shift in (1, 2, 4, 8):
        code = code ^ (code >> shift)
    return code


def _buckets(x_BHND: Tensor, directions_DP: Tensor) -> Tensor:
    """Places of tokens' buckets along the Gray code, int64 [B, H, N]."""
    bits = (x_BHND @ directions_DP) > 0
    powers = 1 << torch.arange(bits.shape[-1], device=bits.device)
    return gray_rank((bits * powers).sum(-1))


def _evenly(tokens: int, count: int, device: torch.device) -> Tensor:
    """``count`` tokens, or all of fewer, evenly spaced."""
    count = min(count, tokens)
    return (torch.arange(count, device=device) * tokens + tokens // 2) // count


def _map(q_tokens: int, kv_tokens: int, block: int, device: torch.device) -> Tensor:
    """The first key block, of samples, and for every query block the one at its place among the rest: [Tq, Tk].

    Places are those of middles; a rest that is shorter than the queries is stretched.
    """
    q_blocks, kv_blocks = -(-q_tokens // block), -(-kv_tokens // block)
    q = torch.arange(q_blocks, device=device)
    place = 1 + (2 * q + 1) * (kv_blocks - 1) // (2 * q_blocks)
    on = torch.arange(kv_blocks, device=device) == place.clamp(max=kv_blocks - 1)[:, None]
    on[:, 0] = True
    return on
