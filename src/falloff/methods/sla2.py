"""SLA2 (arXiv:2602.12675): sparse and linear attention mixed by a learned share instead of added.

Softmax attention over some blocks is renormalised, so that it stands for all of them but alpha, the share of the
softmax's mass that lies in those blocks. With O^l linear attention over the others,

    O = alpha O^s + (1 - alpha) O^l,

which is full attention exactly where alpha is that share and O^l is softmax attention over the others. Keys are freed
of their mean, for the blocks as for O^l. Blocks are chosen by a learned router, (R_q p_i) . (R_k p_j) of block means,
R the identity at first, by their highest scores. No gradient passes that choice: while R is fitted, every block has a
share m_ij of ``soft_topk`` in O^s and 1 - m_ij in O^l instead.

The paper leaves open how alpha fits any number of tokens. Ours is, of query block i and head h,

    alpha_i = sigmoid(a_h logit(A_i) + c_h),    logit(A_i) = log of the mass in the kept blocks / that in the others,

the mass estimated from the same scores, with a = 1 and c = 0 at first: where training starts. No gradient passes
the estimate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from falloff.kernels.blocks import kv_blocks, means, q_blocks
from falloff.kernels.linear import Features, Over, linear_attention
from falloff.kernels.soft import soft_attention
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.branch import Branch, Layer, Work, blank_linear
from falloff.methods.layout import Prediction, UniformBlocks, check_count, check_share, predicted
from falloff.methods.pooling import block_means
from falloff.methods.select import topk
from falloff.methods.sla import share_of
from falloff.methods.soft_topk import soft_topk
from falloff.plan import Plan
from falloff.schedule import Schedule

SURE = 30.0
"""Beyond this logit a share is 0 or 1 in float32."""


@dataclass(frozen=True, kw_only=True)
class SLA2(Method):
    """The highest blocks by softmax, others by linear attention, mixed by a learned share; text is kept throughout.

    density: the share of key blocks that is kept, rounded down, at least one; above 0 and at most 1.
    features: the feature map phi, "softmax" over a head's channels, "elu" (+ 1) or "relu".
    q_block, kv_block: tokens of a block of queries and of keys; the last one may be shorter.
    """

    name: ClassVar[str] = "sla2"
    schedule: ClassVar[Schedule] = Schedule(dense_first=0, dense_layers=())
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "density": Span(0.03, 0.5),
        "q_block": Choices((64, 128)),
        "kv_block": Choices((32, 64, 128)),
    }

    density: float = 0.05
    features: Features = "softmax"
    q_block: int = 128
    kv_block: int = 64

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if self.features not in get_args(Features):
            raise ValueError(f"features = {self.features!r} must be one of {', '.join(get_args(Features))}")
        check_count("q_block", self.q_block)
        check_count("kv_block", self.kv_block)

    @property
    def learns(self) -> bool:
        return True

    @property
    def branch_settings(self) -> dict[str, Any]:
        return {"features": self.features}

    def branch(self, layer: Layer) -> Mixed:
        return Mixed(layer.heads, layer.head_dim, features=self.features)

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        assert state.trained is None or isinstance(state.trained, Mixed)
        route = similarity if state.trained is None else state.trained.route

        @torch.no_grad()
        def predict(q: Tensor, k: Tensor, _: slice) -> Prediction:
            k_means = block_means(k, self.kv_block)
            k_means = k_means - k.mean(2, keepdim=True, dtype=k_means.dtype)
            scores = route(block_means(q, self.q_block), k_means)
            return Prediction(topk(scores, max(1, share_of(scores.shape[-1], self.density))))

        return predicted(call.sequence, self.q_block, self.kv_block, q_BHND, k_BHND, predict)


def similarity(q_BHTD: Tensor, k_BHTD: Tensor) -> Tensor:
    """Scores of pairs of block means, [B, H, Tq, Tk]."""
    return q_BHTD @ k_BHTD.mT


def mix(kept: Tensor, rest: Tensor, logit: Tensor) -> Tensor:
    """``alpha kept + (1 - alpha) rest`` of outputs [..., D] with ``alpha = sigmoid(logit)``, logit [...]."""
    alpha = logit.sigmoid()[..., None]
    return alpha * kept + (1 - alpha) * rest


class Mixed(Branch):
    """One layer's router R, shared by its heads and frozen until asked to learn, and every head's a and c; float32."""

    def __init__(self, heads: int, head_dim: int, *, features: Features) -> None:
        super().__init__()
        self.router_q, self.router_k = (blank_linear(head_dim, head_dim, bias=False) for _ in range(2))
        for router in (self.router_q, self.router_k):
            with torch.no_grad():
                router.weight.copy_(torch.eye(head_dim))
            router.requires_grad_(False)
        self.slope, self.offset = nn.Parameter(torch.ones(heads)), nn.Parameter(torch.zeros(heads))
        self.features = features

    def route(self, q_BHTD: Tensor, k_BHTD: Tensor) -> Tensor:
        """Scores of pairs of block means, [B, H, Tq, Tk]. Differentiable in R."""
        r_q, r_k = (router.weight.to(q_BHTD.dtype) for router in (self.router_q, self.router_k))
        return similarity(q_BHTD @ r_q.mT, k_BHTD @ r_k.mT)

    def forward(self, work: Work) -> Tensor:
        k = centred(work.k_BHND, work.key_valid_BN)
        if not self.fitting:
            return self._mixed(work, k, work.out_BHND, "complement", self.balance(work, k))
        shares = self.shares(work, k)
        kept = soft_attention(
            work.plan, shares, work.q_BHND, k, work.v_BHND, scale=work.scale, key_valid=work.key_valid_BN
        )
        return self._mixed(work, k, kept, 1 - shares, self.balance(work, k, shares))

    def shares(self, work: Work, k_BHND: Tensor) -> Tensor:
        """Soft marks of every query block's choice, [B, H, Tq, Tk], that sum to the number kept. Differentiable in R.

        Ones for blocks with text, which are no choice.
        """
        sequence, plan = work.sequence, work.plan
        assert sequence is not None
        assert isinstance(plan.q_sizes, int)
        assert isinstance(plan.kv_sizes, int)
        sides = [UniformBlocks(sequence, size).pinned for size in (plan.q_sizes, plan.kv_sizes)]
        (q_before, q_after), (k_before, k_after) = sides
        scores = self._scores(work, k_BHND)[0]
        rows, columns = scores.shape[2] - q_after, scores.shape[3] - k_after
        open_ = scores[:, :, q_before:rows, k_before:columns]
        if not open_.numel():
            return torch.ones_like(scores)
        kept = plan.blocks.dense()[:, :, q_before, k_before:columns].sum(-1).amax()
        return F.pad(soft_topk(open_, int(kept)), (k_before, k_after, q_before, q_after), value=1.0)

    def _mixed(self, work: Work, k: Tensor, kept: Tensor, over: Over | Tensor, logit_BHT: Tensor) -> Tensor:
        """``kept`` and linear attention ``over`` the other blocks, by the learned share."""
        linear, weight = linear_attention(
            work.plan, work.q_BHND, k, work.v_BHND, features=self.features, over=over, key_valid=work.key_valid_BN
        )
        heads = slice(work.first_head, work.first_head + logit_BHT.shape[1])
        slope, offset = (x[heads, None].to(logit_BHT.dtype) for x in (self.slope, self.offset))
        block = work.plan.q_block_of().expand(*weight.shape)
        logit = (slope * logit_BHT + offset).gather(2, block)
        rest_is_empty = weight == 0
        mixed = mix(kept, linear, logit)
        return torch.where(rest_is_empty[..., None], kept.to(mixed.dtype), mixed).to(work.out_BHND.dtype)

    @torch.no_grad()
    def balance(self, work: Work, k_BHND: Tensor, shares_BHQK: Tensor | None = None) -> Tensor:
        """Log of the estimated mass in the blocks a query block keeps / that in the others, [B, H, Tq].

        ``shares_BHQK``: how far it keeps them, in place of the plan's map.
        """
        scores, counts = self._scores(work, k_BHND)
        kept = (work.plan.blocks.dense() if shares_BHQK is None else shares_BHQK).to(scores.dtype)
        masses = scores + counts.log()[..., None, :]
        inside, outside = ((masses + share.log()).logsumexp(-1) for share in (kept, 1 - kept))
        return (inside - outside).nan_to_num(nan=0.0).clamp(-SURE, SURE)

    def _scores(self, work: Work, k_BHND: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled scores of all pairs of blocks, [B, H, Tq, Tk], and the valid tokens of key blocks [B, H, Tk]."""
        q_means, _ = means(q_blocks(work.plan), work.q_BHND)
        k_means, counts = means(kv_blocks(work.plan), k_BHND, work.key_valid_BN)
        return work.scale * self.route(q_means, k_means), counts


def centred(k_BHND: Tensor, valid_BN: Tensor | None) -> Tensor:
    """Keys less the mean of those that are no padding."""
    wide = torch.promote_types(k_BHND.dtype, torch.float32)
    if valid_BN is None:
        return k_BHND - k_BHND.mean(2, keepdim=True, dtype=wide).to(k_BHND.dtype)
    valid = valid_BN[:, None, :, None]
    total = k_BHND.masked_fill(~valid, 0).sum(2, keepdim=True, dtype=wide)
    mean = total / valid.sum(2, keepdim=True).clamp(min=1)
    return k_BHND - mean.to(k_BHND.dtype)
