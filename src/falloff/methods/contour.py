"""Contour: an exact look at few steps decides, for a whole layer, what is computed and what is left to means.

Queries and keys of every head are clustered as in Sparse VideoGen2 (arXiv:2505.18875), and clusters that a query skips
answer it by their means, as in SVG-EAR (arXiv:2603.08982). What is new is how pairs of clusters are chosen. At a few
steps of a run some queries of every cluster are looked at as they are, with the weights p that all keys have for them.
With pbar_iJ the weight that each of the m_J keys of cluster J would have were it the cluster's mean, the error of
leaving J to its mean is, over the queries i that stand for cluster I,

    E_IJ = mean_i sum_{k in J} (p_ik - pbar_iJ)^2.

Weights of a softmax can be compared, within a head and between heads. So the budget belongs to the layer: of all heads
and rows together those pairs are computed that spare most error for their size, E_IJ / m_J. Heads with broad
attention, which means answer well, give to heads with sharp attention. As in AdaSpa (arXiv:2502.21079), the plan
serves until the next look: clustering and choosing cost a few calls of a run instead of all. Text is always computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from falloff.kernels import look
from falloff.kernels.groups import groups_within
from falloff.kernels.product import product
from falloff.methods.adaspa import check_every, due
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.ear import segment_means
from falloff.methods.kmeans import Clusters, kmeans
from falloff.methods.layout import NOT_FINITE, check_count, check_share
from falloff.methods.pinned import Side, blocks_with_text, grid_tokens, plan_with_text
from falloff.methods.svg2 import neighbours
from falloff.plan import Plan
from falloff.schedule import Schedule

LOOK_BYTES = 128 << 20
"""Weights held at once during a look."""
CPU_LOOK_BYTES = 4 << 20
"""The same on CPUs, where passes over weights that have left a core's cache take longer than the product."""
WEIGHT_BYTES = 8
"""Of one query and key: its weight, in place of its logit, and what sums need on the way."""
MOST_CLUSTERS = 1000


@dataclass(frozen=True, kw_only=True)
class Contour(Method):
    """Contour over any grid, images included, with text on either side.

    density: share of the token pairs of a layer that is computed, above 0 and at most 1; every query sees one cluster
        at least.
    q_tokens, k_tokens: tokens a cluster of queries and of keys on average, of at most 1000 clusters.
    queries: of every cluster that are looked at; what a look costs and what it is worth grow with their share.
    look_every: steps from one look to the next, or their share of all steps when a float.
    first_iterations: k-means iterations of a layer's first look; iterations: of every later one.
    seed: of where the stretches of neighbours are cut that k-means starts from.
    """

    name: ClassVar[str] = "contour"
    schedule: ClassVar[Schedule] = Schedule(dense_first=0.25, dense_layers=())
    dial: ClassVar[str | None] = "density"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "density": Span(0.03, 0.5, log=True),
        "q_tokens": Choices((32, 64, 128)),
        "k_tokens": Choices((8, 16, 32, 64)),
        "queries": Choices((8, 16, 24, 32)),
        "look_every": Choices((0.1, 0.25, 0.5)),
    }

    density: float = 0.2
    q_tokens: int = 64
    k_tokens: int = 32
    queries: int = 16
    look_every: int | float = 0.25
    first_iterations: int = 3
    iterations: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_share("density", self.density)
        for field, unit in (("q_tokens", "tokens"), ("k_tokens", "tokens"), ("queries", "queries")):
            check_count(field, getattr(self, field), unit)
        for field in ("first_iterations", "iterations"):
            check_count(field, getattr(self, field), "iterations")
        check_every("look_every", self.look_every)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed = {self.seed!r} must be a whole number of at least 0")

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        """The layer's last plan until a look is due; without a known step, that of the first call."""
        shape = (call.sequence, q_BHND.shape, q_BHND.device)
        kept = state.values if state.values.get("shape") == shape else {}
        if kept and not due(call, kept["step"], self.look_every):
            plan: Plan = kept["plan"]
            return plan
        q_video, k_video = (grid_tokens(x, call.sequence) for x in (q_BHND, k_BHND))
        q = self._cluster(q_video, self.q_tokens, kept.get("q"), call, state)
        k = self._cluster(k_video, self.k_tokens, kept.get("k"), call, state)
        if not bool(q.finite & k.finite):
            return NOT_FINITE
        q_order, k_order = q.order(), k.order()
        looked = _taken(q_video, spread(q_order, q.sizes, self.queries))
        worth = spared(looked, k_video, k_order, k.sizes, self.queries)
        on = best_pairs(worth, q.sizes, k.sizes, self.density)
        blocks = blocks_with_text(call.sequence, on, q.sizes, k.sizes)
        plan = plan_with_text(call.sequence, Side(q_order, q.sizes), Side(k_order, k.sizes), blocks, summary=True)
        state.values = {"shape": shape, "step": call.step, "plan": plan}
        state.values |= {"q": q.centroids.to(q_BHND.dtype), "k": k.centroids.to(k_BHND.dtype)}
        return plan

    def _cluster(self, x_BHND: Tensor, tokens: int, before: Tensor | None, call: Call, state: State) -> Clusters:
        if before is not None:
            return kmeans(x_BHND, before, self.iterations)
        count = min(-(-x_BHND.shape[2] // tokens), MOST_CLUSTERS)
        return kmeans(x_BHND, neighbours(x_BHND, count, self.seed, call, state), self.first_iterations)


def spread(order_BHN: Tensor, sizes_BHC: Tensor, count: int) -> Tensor:
    """``count`` tokens of every cluster, evenly spaced in its order, int64 [B, H, C * count].

    Tokens of smaller clusters come more than once; an empty cluster gets some token of another.
    """
    start = sizes_BHC.cumsum(-1) - sizes_BHC
    step = (2 * torch.arange(count, device=sizes_BHC.device) + 1) * sizes_BHC[..., None] // (2 * count)
    place = (start[..., None] + step).clamp(max=order_BHN.shape[2] - 1)
    return order_BHN.gather(2, place.flatten(2))


def spared(looked_BHRD: Tensor, keys_BHND: Tensor, order_BHN: Tensor, sizes_BHC: Tensor, per_cluster: int) -> Tensor:
    """E_IJ / m_J of the module's docstring [B, H, Cq, Ck], in float32 at least; 0 for clusters without keys.

    ``looked_BHRD``: ``per_cluster`` queries of each of Cq clusters. ``order_BHN``: the keys cluster by cluster, as
    many as ``sizes_BHC``.
    """
    batch, heads, rows, head_dim = looked_BHRD.shape
    if look.runs(keys_BHND):
        return look.spared(looked_BHRD, keys_BHND, order_BHN, sizes_BHC, per_cluster, head_dim**-0.5)
    exact = torch.promote_types(keys_BHND.dtype, torch.float32)
    clusters = rows // per_cluster
    worth = torch.empty(batch, heads, clusters, sizes_BHC.shape[2], dtype=exact, device=keys_BHND.device)
    row_bytes = WEIGHT_BYTES * keys_BHND.shape[2] * per_cluster
    look_bytes = min(LOOK_BYTES, CPU_LOOK_BYTES) if keys_BHND.device.type == "cpu" else LOOK_BYTES
    together = max(1, min(clusters, look_bytes // row_bytes))
    for group in groups_within(batch, heads, together * row_bytes, look_bytes):
        keys, lengths = _taken(keys_BHND[group], order_BHN[group]), sizes_BHC[group]
        means = _by_cluster(keys.to(exact), lengths)
        for first in range(0, clusters, together):
            some = slice(first * per_cluster, (first + together) * per_cluster)
            queries = looked_BHRD[group][:, some] * head_dim**-0.5
            logits = product(keys, queries.mT)  # keys down, so that clusters are consecutive rows
            top = logits.amax(1, keepdim=True)
            weights = logits.sub_(top).exp_()  # in place, and not yet shares: passes over them are what a look costs
            mean = _by_cluster(weights, lengths)
            square = _by_cluster(weights.square_(), lengths)
            at_mean = (means @ queries.to(exact).mT - top).exp()
            error = (square - 2 * at_mean * mean + at_mean.square()).clamp(min=0)
            error = error / (mean * lengths[..., None]).sum(1, keepdim=True).square()
            error = error.masked_fill((lengths == 0)[..., None], 0)
            by_cluster = error.view(*error.shape[:2], -1, per_cluster).mean(-1)
            worth[group][:, first : first + together] = by_cluster.mT
    return worth


def best_pairs(worth_BHQK: Tensor, q_sizes_BHQ: Tensor, k_sizes_BHK: Tensor, density: float) -> Tensor:
    """The worthiest pairs of clusters of all heads together, bool [B, H, Cq, Ck].

    As many as leave at most ``density`` of the token pairs computed; every row has its worthiest in any case.
    """
    pairs = q_sizes_BHQ[..., :, None] * k_sizes_BHK[..., None, :]
    first = torch.zeros_like(worth_BHQK, dtype=torch.bool)
    real = worth_BHQK.masked_fill((k_sizes_BHK == 0)[..., None, :], -1)
    first.scatter_(3, real.argmax(-1, keepdim=True), True)
    order = _descending(real.masked_fill(first, torch.inf).flatten(1))
    budget = density * pairs.flatten(1).sum(1, keepdim=True)
    within = pairs.flatten(1).gather(1, order).cumsum(1) <= budget
    on = torch.zeros_like(within).scatter_(1, order, within).view(worth_BHQK.shape)
    return on | first


def _descending(x_BN: Tensor) -> Tensor:
    """Places of every row's numbers, the highest first; equal ones in any order."""
    if x_BN.device.type == "cpu":  # NumPy sorts by vector instructions, several times faster
        return torch.from_numpy(np.argsort(x_BN.neg().numpy(), -1))
    return x_BN.argsort(dim=1, descending=True, stable=True)


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """Tokens [..., n, D] at places [..., n] of x [..., N, D]."""
    return x.gather(-2, places[..., None].expand(*places.shape, x.shape[-1]))


def _by_cluster(x_HND: Tensor, lengths_HC: Tensor) -> Tensor:
    """Means over the clusters of every head, [H, C, D]."""
    return segment_means(x_HND.flatten(0, 1), lengths_HC.flatten()).view(*lengths_HC.shape, -1)
