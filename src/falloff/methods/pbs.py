"""PBS-Attn (arXiv:2510.21270) for video: keys sorted by importance, so that heavy keys share blocks.

A key's importance is the attention it gets from a few proxy queries,

    imp_j = mean_p softmax_j(q_p . k_j / sqrt(d)).

Keys are sorted by it, highest first, inside segments of the sequence. Then blocks are scored by their means,
P = softmax_j(mean(q)_i . mean(k)_j / sqrt(d)), and a row keeps the fewest blocks whose P together is at least
``tau``. The paper is about text, where proxies are the last queries and a query's own segment is kept for causality;
in a video every query sees both ways, so proxies are spread evenly and nothing is kept for its place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Grid
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import Prediction, check_count, check_share, predicted
from falloff.methods.pooling import block_means
from falloff.methods.select import mass_ge
from falloff.plan import Plan

SCORES = 1 << 22
"""Scores of proxies held at once: 16 MiB in float32, and as much again for their softmax."""


@dataclass(frozen=True, kw_only=True)
class PBS(Method):
    """Blocks of importance-sorted keys over the video's tokens; text is seen by all and sees all.

    tau: share of a row's P to keep, above 0 and at most 1.
    segment: keys are sorted inside the whole "video", inside runs of so many tokens as a "frame" has, or inside runs of
        so many tokens; the paper has 256.
    proxies: queries that importance is asked of, evenly spaced over the video.
    block: tokens of a block.
    """

    name: ClassVar[str] = "pbs"
    dial: ClassVar[str | None] = "tau"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "tau": Span(0.3, 0.98),
        "segment": Choices(("video", "frame")),
        "block": Choices((32, 64, 128)),
    }

    tau: float = 0.9
    segment: int | Literal["video", "frame"] = "video"
    proxies: int = 128
    block: int = 128

    def __post_init__(self) -> None:
        check_share("tau", self.tau)
        if self.segment not in ("video", "frame") and (
            isinstance(self.segment, bool) or not isinstance(self.segment, int) or self.segment < 1
        ):
            raise ValueError(f'segment = {self.segment!r} must be "video", "frame" or a number of tokens of at least 1')
        check_count("proxies", self.proxies, "queries")
        check_count("block", self.block)

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        segment = self.segment_tokens(call.sequence.grid)
        return predicted(
            call.sequence, self.block, self.block, q_BHND, k_BHND, lambda q, k, _: self._predict(q, k, segment)
        )

    def segment_tokens(self, grid: Grid) -> int:
        if isinstance(self.segment, int):
            return self.segment
        return grid.tokens if self.segment == "video" else grid.frame_tokens

    def _predict(self, q_BHND: Tensor, k_BHND: Tensor, segment: int) -> Prediction:
        order_BHN = sort_in_segments(importance(q_BHND, k_BHND, self.proxies), segment)
        k_sorted = k_BHND.gather(2, order_BHN[..., None].expand_as(k_BHND))
        scores = block_means(q_BHND, self.block) @ block_means(k_sorted, self.block).mT
        mass = (scores * q_BHND.shape[3] ** -0.5).softmax(-1)
        return Prediction(mass_ge(mass, self.tau), kv_order=order_BHN)


def importance(q_BHND: Tensor, k_BHND: Tensor, proxies: int) -> Tensor:
    """Mean attention that every key gets from evenly spaced queries, [B, H, N] in float32 at least."""
    batch, heads, tokens, channels = q_BHND.shape
    count = min(proxies, tokens)
    asked = (torch.arange(count, device=q_BHND.device) * tokens + tokens // 2) // count
    q_BHPD = q_BHND[:, :, asked] * channels**-0.5
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    got = torch.zeros(batch, heads, k_BHND.shape[2], dtype=exact, device=k_BHND.device)
    for part in torch.split(q_BHPD, max(1, SCORES // got.numel()), 2):
        got += (part @ k_BHND.mT).to(exact).softmax(-1).sum(2)
    return got / count


def sort_in_segments(importance_BHN: Tensor, segment: int) -> Tensor:
    """Indices by falling importance inside consecutive segments of tokens, the last one shorter: int64 [B, H, N]."""
    batch, heads, tokens = importance_BHN.shape
    segment = min(segment, tokens)
    padded = F.pad(importance_BHN, (0, -tokens % segment), value=-torch.inf)
    order = padded.view(batch, heads, -1, segment).argsort(dim=-1, descending=True, stable=True)
    starts = torch.arange(0, tokens, segment, device=order.device)
    return (order + starts[:, None]).flatten(2)[..., :tokens]
