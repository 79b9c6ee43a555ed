"""SLA, sparse-linear attention (arXiv:2509.24006): the highest blocks exactly, the rest by linear attention.

Keys are freed of their mean, blocks are told by their means p, and of the scores p_i . p_j every row of query blocks
keeps its highest as *critical*, drops its lowest as *negligible* and calls the others *marginal*. Then

    O = O^s + O^l W^T + b,

O^s softmax attention over the critical blocks, O^l linear attention phi(Q) . phi(K) over the marginal ones (see
``kernels.linear``), W [d, d] and b [d] one layer's, shared by its heads and zero at first. Nothing is gained by the
linear part before W is trained. What goes by this name besides: O^l over all that is not critical ("complement", the
first published code), and over all keys ("all", the later code and the weights trained with it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.kernels.linear import Features, Over, linear_attention
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.branch import Branch, Layer, Work, blank_linear
from falloff.methods.layout import Prediction, check_count, check_share, predicted
from falloff.methods.pooling import block_means
from falloff.methods.select import topk
from falloff.plan import Plan
from falloff.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class SLA(Method):
    """Critical blocks by softmax, others by linear attention with a trained projection; text is critical throughout.

    density: the share of key blocks that is critical, rounded down, at least one; above 0 and at most 1.
    negligible: the share that "marginal" drops, rounded down, of those that are not critical; 0 to below 1.
    linear_over: the key blocks of the linear part: "marginal" as in the paper, "complement" or "all".
    features: the feature map phi, "softmax" over a head's channels, "elu" (+ 1) or "relu".
    q_block, kv_block: tokens of a block of queries and of keys; the last one may be shorter.
    """

    name: ClassVar[str] = "sla"
    schedule: ClassVar[Schedule] = Schedule(dense_first=0, dense_layers=())
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "density": Span(0.03, 0.5),
        "q_block": Choices((64, 128)),
        "kv_block": Choices((32, 64, 128)),
    }

    density: float = 0.05
    negligible: float = 0.1
    linear_over: Over = "marginal"
    features: Features = "softmax"
    q_block: int = 64
    kv_block: int = 64

    def __post_init__(self) -> None:
        check_share("density", self.density)
        if isinstance(self.negligible, bool) or not 0.0 <= self.negligible < 1.0:
            raise ValueError(f"negligible = {self.negligible} must be at least 0 and below 1")
        if self.linear_over not in get_args(Over):
            raise ValueError(f"linear_over = {self.linear_over!r} must be one of {', '.join(get_args(Over))}")
        if self.features not in get_args(Features):
            raise ValueError(f"features = {self.features!r} must be one of {', '.join(get_args(Features))}")
        check_count("q_block", self.q_block)
        check_count("kv_block", self.kv_block)

    @property
    def learns(self) -> bool:
        return True

    @property
    def branch_settings(self) -> dict[str, Any]:
        return {"linear_over": self.linear_over, "features": self.features}

    def branch(self, layer: Layer) -> Projected:
        return Projected(layer.head_dim, linear_over=self.linear_over, features=self.features)

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        return predicted(call.sequence, self.q_block, self.kv_block, q_BHND, k_BHND, self._predict)

    def _predict(self, q_BHND: Tensor, k_BHND: Tensor, _: slice) -> Prediction:
        k_means = block_means(k_BHND, self.kv_block)
        k_means = k_means - k_BHND.mean(2, keepdim=True, dtype=k_means.dtype)
        scores = block_means(q_BHND, self.q_block) @ k_means.mT
        critical, negligible = classes(scores, self.density, self.negligible)
        return Prediction(critical, dropped=negligible if self.linear_over == "marginal" else None)


def classes(scores: Tensor, density: float, negligible: float) -> tuple[Tensor, Tensor]:
    """Of every row of scores [..., Tk] the critical and the negligible blocks, as booleans of the same shape."""
    blocks = scores.shape[-1]
    most = min(blocks, max(1, share_of(blocks, density)))
    least = min(share_of(blocks, negligible), blocks - most)
    critical = topk(scores, most)
    if not least:
        return critical, torch.zeros_like(critical)
    return critical, topk(-scores.masked_fill(critical, torch.inf), least)


def share_of(blocks: int, share: float) -> int:
    """A share of some blocks, rounded down."""
    return int(share * blocks + 1e-9 * blocks)  # 0.3 * 10 is a little less than 3


class Projected(Branch):
    """One layer's W and b, in float32 whatever the model's type."""

    def __init__(self, head_dim: int, *, linear_over: Over, features: Features) -> None:
        super().__init__()
        self.proj = blank_linear(head_dim, head_dim, bias=True)
        self.linear_over, self.features = linear_over, features

    def forward(self, work: Work) -> Tensor:
        linear, _ = linear_attention(
            work.plan,
            work.q_BHND,
            work.k_BHND,
            work.v_BHND,
            features=self.features,
            over=self.linear_over,
            key_valid=work.key_valid_BN,
        )
        weight, bias = self.proj.weight.to(linear.dtype), self.proj.bias.to(linear.dtype)
        return work.out_BHND + F.linear(linear, weight, bias)
