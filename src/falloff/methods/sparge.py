"""SpargeAttn (arXiv:2502.18137): blocks predicted from block means, where means speak for their blocks.

Keys are first freed of their mean, K <- K - mean(K). With means p_i of query blocks and p_j of key blocks,

    P_ij = softmax_j(p_i . p_j / sqrt(d)),

and a row keeps its highest blocks by one of four rules, the last of them SpargeAttention2's (arXiv:2602.13515). A mean
says little about a block of unlike tokens, so that
every block whose self-similarity

    c = mean over its pairs of tokens of cos(x_t, x_u) = |mean_t x_t / |x_t||^2,    0 <= c <= 1,

is not above ``theta`` is computed throughout: all of its row if it holds queries, all of its column if it holds keys,
which then takes no part in the softmax.

That is the first stage. In the second, with ``skip``, a kernel leaves further blocks out while it computes: those whose
weights would all be below 2^-skip of the largest that their queries have met before (``falloff.kernels.skip``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import Prediction, check_count, check_share, predicted
from falloff.methods.pooling import block_means
from falloff.methods.select import mass_ge, mass_le, topk, union
from falloff.plan import Plan

Mode = Literal["topk", "mass_le", "mass_ge", "union"]


@dataclass(frozen=True, kw_only=True)
class SpargeAttn(Method):
    """SpargeAttn's block prediction over the video's tokens; text is seen by all and sees all.

    mode: "topk" keeps ``keep`` of each row's key blocks, rounded down, at least one; "mass_le" the highest blocks
        whose P together is at most ``keep``, at least one, as the published code; "mass_ge" the fewest blocks whose
        P together is at least ``keep``; "union" what "topk" keeps, and the fewest whose P together is at least
        ``mass``. Its published shares are not known: those here are ours.
    keep: the share of blocks or of mass, above 0 and at most 1.
    mass: the share of mass of "union" alone, above 0 and at most 1.
    theta: the self-similarity that a block must exceed to be predicted; below 0 all are. The published code has
        -0.1 with "topk", and 0.6 with "mass_le". Legal: -1 to 1.
    q_block, kv_block: tokens of a block of queries and of keys. A shorter last block is judged by its own tokens.
    skip: bits of the second stage, at least 0; the published code has 50, next to nothing, and tunes from 0 up. It
        gains on GPUs only, and for inference only. ``None`` leaves the second stage out.
    """

    name: ClassVar[str] = "sparge"
    dial: ClassVar[str | None] = "keep"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "mode": Choices(get_args(Mode)),
        "keep": Span(0.05, 0.95),
        "mass": Span(0.05, 0.95),
        "theta": Span(-0.1, 0.9),
        "q_block": Choices((32, 64, 128)),
        "kv_block": Choices((32, 64, 128)),
    }

    mode: Mode = "topk"
    keep: float = 0.5
    mass: float = 0.5
    theta: float = -0.1
    q_block: int = 128
    kv_block: int = 64
    skip: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ValueError(f"mode = {self.mode!r} must be one of {', '.join(get_args(Mode))}")
        check_share("keep", self.keep)
        check_share("mass", self.mass)
        if not -1.0 <= self.theta <= 1.0:
            raise ValueError(f"theta = {self.theta} is outside -1.0 to 1.0")
        check_count("q_block", self.q_block)
        check_count("kv_block", self.kv_block)
        if self.skip is not None and (isinstance(self.skip, bool) or not self.skip >= 0):
            raise ValueError(f"skip = {self.skip!r} must be a number of bits of at least 0, or None")

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        plan = predicted(
            call.sequence, self.q_block, self.kv_block, q_BHND, k_BHND, lambda q, k, _: Prediction(self.block_map(q, k))
        )
        if isinstance(plan, Dense) or self.skip is None:
            return plan
        return dataclasses.replace(plan, skip=self.skip)

    def block_map(self, q_BHND: Tensor, k_BHND: Tensor) -> Tensor:
        """Which pairs of blocks are computed, bool [B, H, Tq, Tk]."""
        k_BHND = k_BHND - k_BHND.mean(2, keepdim=True, dtype=_exact(k_BHND)).to(k_BHND.dtype)
        scores = block_means(q_BHND, self.q_block) @ block_means(k_BHND, self.kv_block).mT
        scores = scores * q_BHND.shape[3] ** -0.5
        if self.theta < 0:
            return self._select(scores)
        unlike_q = self_similarity(q_BHND, self.q_block) <= self.theta
        unlike_k = self_similarity(k_BHND, self.kv_block) <= self.theta
        on = self._select(scores.masked_fill(unlike_k[:, :, None], -torch.inf))
        return on | unlike_q[..., None] | unlike_k[:, :, None]

    def _select(self, scores: Tensor) -> Tensor:
        count = max(1, int(self.keep * scores.shape[-1]))
        if self.mode == "topk":
            return topk(scores, count)
        if self.mode == "union":
            return union(scores, count, self.mass)
        mass = scores.softmax(-1).nan_to_num()  # NaN where no key block of the row is predicted
        return mass_le(mass, self.keep) if self.mode == "mass_le" else mass_ge(mass, self.keep)


def self_similarity(x_BHND: Tensor, block: int) -> Tensor:
    """The mean cosine between tokens of a block, itself included, [B, H, T]; a token of zeros is like none."""
    length = x_BHND.norm(dim=-1, keepdim=True, dtype=_exact(x_BHND))
    unit = x_BHND * (1 / length.clamp(min=torch.finfo(length.dtype).tiny)).to(x_BHND.dtype)
    return block_means(unit, block).square().sum(-1)


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
