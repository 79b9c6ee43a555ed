"""Recall: how much of a model's own attention the plans of methods keep, measured in a dense run.

For sampled queries the softmax over all keys is computed, and the part of it that lies on the keys which a plan keeps
is added up. 1 means that nothing of worth was left out, whatever the plan's density.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from torch import Tensor

from falloff.evaluation.probe import draw
from falloff.methods.base import Call, Method, State
from falloff.plan import Plan


@dataclass(frozen=True)
class Recall:
    """Of one call: the share of attention kept, mean over sampled queries and heads, and the plan's density."""

    layer: int
    kept: float
    density: float


@dataclass(frozen=True)
class Recalls:
    """What one method would have kept, call by call. Calls that it would have left dense are not among them."""

    calls: list[Recall] = field(default_factory=list)

    def mean(self) -> float | None:
        """Attention kept."""
        return fmean(call.kept for call in self.calls) if self.calls else None

    def by_layer(self) -> dict[int, float]:
        """Attention kept in every layer."""
        return self._by_layer(lambda call: call.kept)

    def density_by_layer(self) -> dict[int, float]:
        return self._by_layer(lambda call: call.density)

    def _by_layer(self, value: Callable[[Recall], float]) -> dict[int, float]:
        layers = sorted({call.layer for call in self.calls})
        return {layer: fmean(value(call) for call in self.calls if call.layer == layer) for layer in layers}


@dataclass(frozen=True, kw_only=True)
class RecallObserver:
    """Notes what methods would have kept, for a ``Probe``.

    methods: whose plans are judged, each with a state of its own, as if it had been asked at the probe's steps alone.
    queries: drawn a call, from all tokens. seed: of the draw.
    """

    methods: tuple[Method, ...]
    queries: int = 64
    seed: int = 0
    found: tuple[Recalls, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries = {self.queries} must be at least 1")
        object.__setattr__(self, "found", tuple(Recalls() for _ in self.methods))

    def see(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> None:
        rows = draw(self.queries, q_BHND.shape[2], call, self.seed).to(q_BHND.device)
        states = state.values.setdefault("states", [State() for _ in self.methods])
        plans = [
            method.plan(call, q_BHND, k_BHND, v_BHND, own) for method, own in zip(self.methods, states, strict=True)
        ]
        sparse = [(found, plan) for found, plan in zip(self.found, plans, strict=True) if isinstance(plan, Plan)]
        shares = kept_mass(q_BHND[:, :, rows], k_BHND, [plan.keys_seen(rows) for _, plan in sparse])
        for (found, plan), share in zip(sparse, shares, strict=True):
            found.calls.append(Recall(call.layer, share, plan.density))


def kept_mass(q_BHRD: Tensor, k_BHND: Tensor, kept: Sequence[Tensor]) -> list[float]:
    """The share of attention on the kept keys, bool [B|1, H|1, R, N] each: mean over batch, heads and queries."""
    batch, heads, _, dim = q_BHRD.shape
    sums = [0.0] * len(kept)
    for b in range(batch):
        for h in range(heads):  # one head at a time: rows of many queries over half a million keys are large
            weights = (q_BHRD[b, h].float() @ k_BHND[b, h].float().mT * dim**-0.5).softmax(-1)
            for place, keys in enumerate(kept):
                sums[place] += float((weights * keys[b % len(keys), h % keys.shape[1]]).sum(-1).mean())
    return [total / (batch * heads) for total in sums]
