"""Sparse VideoGen2 (arXiv:2505.18875): tokens that are alike become blocks, and blocks that matter are computed.

Queries and keys of every head are clustered apart by k-means (sections 3.1 and 3.2 of the paper). With centroids
cq_i and ck_j and m_j keys in cluster j, the attention of cluster i to cluster j is estimated as

    P_ij = m_j exp(cq_i . ck_j / sqrt(D)) / sum_l m_l exp(cq_i . ck_l / sqrt(D)),

and the heaviest clusters of every row are computed until their mass reaches ``mass``. Centroids are carried over from
call to call of a layer, so that an iteration keeps them good; the first start as means of neighbours along a Hilbert
curve in every frame, not as random tokens, and need three. Text is neither clustered nor left out.

With ``summary`` this is SVG-EAR (arXiv:2603.08982, see ear.py): of the same budget the clusters are computed whose
means would answer worst, and those skipped answer by their means instead of not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from falloff.geometry import order
from falloff.kernels.groups import groups_within
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.ear import KEY_BYTES, error_per_pair, spend
from falloff.methods.kmeans import Clusters, first_centroids, kmeans
from falloff.methods.layout import NOT_FINITE
from falloff.methods.pinned import Side, blocks_with_text, grid_tokens, plan_with_text
from falloff.methods.select import cover
from falloff.plan import Plan
from falloff.schedule import Schedule

AUTO = {"q_clusters": (64, 300), "k_clusters": (16, 1000)}
"""Tokens a cluster, the paper's least for queries, and clusters at most, as in the published scripts for 720p."""
ROUTED_TOGETHER = 16
"""Query clusters of a head that are worth a call of their own."""
SORTED_BYTES = 12
"""Of a channel of a key, in the order of the clusters: itself, in float32, and what goes into a product."""
SELECTION_BYTES = 32
"""Of one pair of clusters while the heaviest are found: its mass, sorted, ranked and summed."""
SELECTED_BYTES = 20 << 20
"""Held at once for that."""


@dataclass(frozen=True, kw_only=True)
class SVG2(Method):
    """Sparse VideoGen2 over any grid, images included, with text on either side.

    q_clusters, k_clusters: clusters of queries and of keys; "auto" takes one for every 64 queries and 16 keys, at
        most 300 and 1000. More of them leave out more and lose less, and cost more to find.
    mass: estimated attention that the computed clusters of a row reach. Legal: 0 to 1.
    min_share: at least this share of the key clusters is computed for every row. Legal: 0 to 1.
    first_iterations: k-means iterations of a layer's first call; iterations: of every later one.
    stride: iterations but the last look at every stride-th token.
    span: how many further calls of a layer use its plan again before it is made anew. The published code makes one at
        every call; two more calls with it save two thirds of the planning.
    seed: of where the stretches of neighbours are cut that k-means starts from.
    summary: SVG-EAR; ``mass`` and ``min_share`` then say how many keys a row may see, not which.
    """

    name: ClassVar[str] = "svg2"
    dial: ClassVar[str | None] = "mass"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "mass": Span(0.1, 0.98),
        "min_share": Span(0.0, 0.3),
        "q_clusters": Choices(("auto", 32, 64, 128)),
        "k_clusters": Choices(("auto", 64, 128, 256, 512)),
        "stride": Choices((1, 2, 4)),
        "span": Choices((0, 1, 2, 4)),
        "summary": Choices((False, True)),
    }
    schedule: ClassVar[Schedule] = Schedule(dense_first=0.3)

    q_clusters: int | Literal["auto"] = "auto"
    k_clusters: int | Literal["auto"] = "auto"
    mass: float = 0.9
    min_share: float = 0.1
    first_iterations: int = 3
    iterations: int = 1
    stride: int = 1
    span: int = 2
    seed: int = 0
    summary: bool = False

    def __post_init__(self) -> None:
        for field in ("mass", "min_share"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise ValueError(f"{field} = {getattr(self, field)} is outside 0.0 to 1.0")
        for field in ("q_clusters", "k_clusters"):
            value = getattr(self, field)
            if value != "auto" and not _at_least(value, 1):
                raise ValueError(f'{field} = {value!r} must be a number of clusters of at least 1, or "auto"')
        for field, least in (("first_iterations", 1), ("iterations", 0), ("stride", 1), ("span", 0), ("seed", 0)):
            if not _at_least(getattr(self, field), least):
                raise ValueError(f"{field} = {getattr(self, field)!r} must be a whole number of at least {least}")

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        """Clusters of the layer's last call are where this one starts, unless sizes have changed."""
        shape = (call.sequence, q_BHND.shape, q_BHND.device)
        kept = state.values if state.values.get("shape") == shape else {}
        if "plan" in kept:
            kept["uses"] -= 1
            last: Plan = kept["plan"] if kept["uses"] else kept.pop("plan")
            return last
        q_video, k_video = (grid_tokens(x, call.sequence) for x in (q_BHND, k_BHND))
        q = self._cluster(q_video, self._count("q_clusters", call), kept.get("q"), call, state)
        k = self._cluster(k_video, self._count("k_clusters", call), kept.get("k"), call, state)
        if not bool(q.finite & k.finite):
            return NOT_FINITE
        blocks = blocks_with_text(call.sequence, self._on(q, k, k_video), q.sizes, k.sizes)
        q, k = (_to_keep(found, q_BHND.dtype) for found in (q, k))
        state.values = {"shape": shape, "q": q.centroids, "k": k.centroids}
        q_side = Side(q.order(), q.sizes)
        del kept, q  # centroids of before and labels that are done with take about as much as the plan
        k_side = Side(k.order(), k.sizes)
        del k
        plan = plan_with_text(call.sequence, q_side, k_side, blocks, summary=self.summary)
        if self.span:
            state.values |= {"plan": plan, "uses": self.span}
        return plan

    def _count(self, field: Literal["q_clusters", "k_clusters"], call: Call) -> int:
        value, tokens = getattr(self, field), call.sequence.grid.tokens
        if value == "auto":
            size, most = AUTO[field]
            return min(-(-tokens // size), most)
        if value > tokens:
            raise ValueError(f'{field} = {value} is more than the grid\'s {tokens} tokens; use fewer, or "auto"')
        return int(value)

    def _cluster(self, x_BHND: Tensor, clusters: int, before: Any, call: Call, state: State) -> Clusters:
        if before is None:
            start = neighbours(x_BHND, clusters, self.seed, call, state)
            return kmeans(x_BHND, start, self.first_iterations, stride=self.stride)
        return kmeans(x_BHND, before, self.iterations, stride=self.stride)

    def _on(self, q: Clusters, k: Clusters, keys_BHND: Tensor) -> Tensor:
        """Which pairs of clusters are computed, bool [B, H, Cq, Ck]."""
        batch, heads, q_clusters = q.sizes.shape
        on = torch.empty(*q.sizes.shape, k.sizes.shape[2], dtype=torch.bool, device=q.sizes.device)
        least = max(1, int(self.min_share * k.sizes.shape[2] + 1e-6))
        for group in groups_within(batch, heads, SELECTION_BYTES * q_clusters * k.sizes.shape[2], SELECTED_BYTES):
            share = estimated_mass(q.centroids[group], k.centroids[group], k.sizes[group])
            on[group] = cover(share, self.mass, least=least)
        if self.summary:
            _route(on, q, k, keys_BHND)
        return on


def neighbours(x_BHND: Tensor, clusters: int, seed: int, call: Call, state: State) -> Tensor:
    """Centroids to start from: means of the grid's tokens along a Hilbert curve in every frame, [B, H, C, D].

    The curve is made once for all calls of a session.
    """
    grid, device = call.sequence.grid, x_BHND.device
    key = ("hilbert", grid, device)
    if key not in state.shared:
        curve = order("hilbert", grid)
        assert curve is not None  # as it is for raster order alone
        state.shared[key] = curve.to(device)
    return first_centroids(x_BHND, clusters, seed, order_N=state.shared[key], parts=grid.frames)


def _route(on_BHQK: Tensor, q: Clusters, k: Clusters, keys_BHND: Tensor) -> None:
    """Exchange a row's pairs of clusters, in place, for those whose means would answer worst, of no more keys."""
    batch, heads, length, head_dim = keys_BHND.shape
    head_bytes = length * (KEY_BYTES * min(q.sizes.shape[2], ROUTED_TOGETHER) + SORTED_BYTES * head_dim)
    for group in groups_within(batch, heads, head_bytes):
        sizes = k.sizes[group][:, None].expand(on_BHQK[group].shape)
        places = k.order_of(group)[..., None].expand(-1, -1, head_dim)
        keys = keys_BHND[group].gather(1, places)
        error = error_per_pair(q.centroids[group], keys, k.sizes[group])
        on_BHQK[group] = spend(error, sizes, (sizes * on_BHQK[group]).sum(-1, keepdim=True))


def estimated_mass(q_HCD: Tensor, k_HCD: Tensor, k_sizes_HC: Tensor) -> Tensor:
    """P of the module's docstring from centroids, [H, Cq, Ck]; clusters without keys have none."""
    logits = q_HCD @ k_HCD.mT * q_HCD.shape[-1] ** -0.5
    mass: Tensor = (logits + k_sizes_HC.to(logits.dtype).log()[:, None]).softmax(-1)
    return mass


def _to_keep(clusters: Clusters, dtype: torch.dtype) -> Clusters:
    """With centroids to start from next time; the tokens' precision is all that the first look at them needs."""
    return clusters._replace(centroids=clusters.centroids.to(dtype))


def _at_least(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
