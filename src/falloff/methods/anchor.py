"""AnchorAttention (arXiv:2505.23520) for video: single keys, kept where they come near what is seen anyway.

Groups of queries always see their own group's keys and the video's first ones; the highest logit m_i among these is a
query's anchor. A group keeps every other key that comes within ``theta`` of the anchor for the mean of one of its
blocks of queries at least:

    mean(q)_b . k_j / sqrt(d) + theta >= mean_b(m).

One comparison instead of a sort and a running sum, and keys are picked one by one, not by blocks. The paper is about
text, where queries see backwards only and the rest is added to a first pass; here all of it is one plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import Prediction, UniformBlocks, check_count, predicted
from falloff.methods.pooling import block_means
from falloff.methods.select import near
from falloff.plan import Plan

SCORES = 1 << 22
"""Scores held at once: 16 MiB in float32."""


@dataclass(frozen=True, kw_only=True)
class Anchor(Method):
    """AnchorAttention's keys over the video's tokens; text is seen by all and sees all, as do groups that touch it.

    theta: how far below the anchor a key may stay, in nats, at least 0.
    block: queries of a block, whose mean stands for them.
    step: blocks of a group, which shares its keys. The paper has 16, and 32 for long texts.
    initial: first tokens of the video that all see, at least 1.
    """

    name: ClassVar[str] = "anchor"
    dial: ClassVar[str | None] = "theta"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "theta": Span(0.0, 14.0),
        "block": Choices((32, 64, 128)),
        "step": Choices((1, 2, 4, 16)),
    }

    theta: float = 12.0
    block: int = 128
    step: int = 16
    initial: int = 128

    def __post_init__(self) -> None:
        if not 0.0 <= self.theta < float("inf"):
            raise ValueError(f"theta = {self.theta} must be finite and at least 0")
        check_count("block", self.block)
        check_count("step", self.step, "blocks")
        check_count("initial", self.initial)

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        group = self.block * self.step
        ahead = UniformBlocks(call.sequence, group).tokens.start - call.sequence.video_start
        return predicted(
            call.sequence, group, 1, q_BHND, k_BHND, lambda q, k, _: Prediction(self._key_map(q, k, ahead))
        )

    def _key_map(self, q_BHND: Tensor, k_BHND: Tensor, ahead: int) -> Tensor:
        """Which keys every group sees, bool [B, H, G, Nk]; the first query stands at key ``ahead``."""
        group, keys = self.block * self.step, torch.arange(k_BHND.shape[2], device=k_BHND.device)
        q_BHND = q_BHND * q_BHND.shape[3] ** -0.5
        anchors = block_means(self._anchors(q_BHND, k_BHND, ahead)[..., None], self.block)
        on = self._near(block_means(q_BHND, self.block).to(k_BHND.dtype), anchors, k_BHND)
        own = torch.div(keys - ahead, group, rounding_mode="floor")
        own[keys >= ahead + q_BHND.shape[2]] = -1
        on |= own == torch.arange(on.shape[2], device=keys.device)[:, None]
        on |= keys < self.initial
        return on

    def _anchors(self, q_BHND: Tensor, k_BHND: Tensor, ahead: int) -> Tensor:
        """Every query's highest logit among its own group and the first keys, [B, H, N]."""
        batch, heads, tokens, channels = q_BHND.shape
        group = min(self.block * self.step, tokens)
        groups = -(-tokens // group)
        place = torch.arange(groups * group, device=q_BHND.device).clamp(max=tokens - 1)  # the last one repeats
        shape = (batch, heads, groups, group, channels)
        q, own = q_BHND[:, :, place].view(shape), k_BHND[:, :, ahead + place].view(shape)
        first = k_BHND[:, :, None, : self.initial].expand(-1, -1, groups, -1, -1)
        seen = torch.cat([own, first], 3).flatten(0, 2)
        together = max(1, SCORES // (group * seen.shape[1]))
        highest = [
            (part @ keys.mT).amax(-1)
            for part, keys in zip(torch.split(q.flatten(0, 2), together), torch.split(seen, together), strict=True)
        ]
        return torch.cat(highest).view(batch, heads, -1)[..., :tokens]

    def _near(self, q_means: Tensor, anchors: Tensor, k_BHND: Tensor) -> Tensor:
        """Keys near the anchor of any of a group's blocks, bool [B, H, G, Nk]."""
        batch, heads, keys = k_BHND.shape[:3]
        missing = -q_means.shape[2] % self.step
        q_means = F.pad(q_means, (0, 0, 0, missing))
        anchors = F.pad(anchors, (0, 0, 0, missing), value=torch.inf)
        rows = self.step * max(1, SCORES // (batch * heads * keys * self.step))
        kept = []
        for q, anchor in zip(torch.split(q_means, rows, 2), torch.split(anchors, rows, 2), strict=True):
            blocks = near((q @ k_BHND.mT).to(anchor.dtype), self.theta, anchor)
            kept.append(blocks.view(batch, heads, -1, self.step, keys).any(3))
        return torch.cat(kept, 2)
