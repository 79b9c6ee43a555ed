"""How fast a model's attention falls off with distance: the premise of radial attention, measured.

Radial Attention (arXiv:2506.19852, section 4.1) rests on post-softmax attention that decays exponentially with
distance, ``y = exp(-a x + b)``, in time between tokens at the same position and in space inside a frame. The
probe samples query rows while a dense run goes on, and changes nothing in it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falloff.evaluation.probe import draw
from falloff.geometry import Sequence
from falloff.methods.base import Call, State

Floats = NDArray[np.float64]
AXES = {
    "time": "distance in latent frames, same position",
    "raster": "distance in raster index, same frame",
    "space": "distance in tokens, same frame",
    "picture": "distance in tokens, same picture",
}
SPATIAL_REACH = 40
"""Largest spatial distance told, as in the paper's figure: further out a frame's edge cuts most pairs off."""
SCRATCH_BYTES = 64 << 20
"""Attention rows are held for as many heads at a time as fit in this."""


@dataclass(frozen=True)
class Fit:
    """``y = exp(-a x + b)`` by least squares on log y; ``r2`` is that regression's share of variance explained."""

    a: float
    b: float
    r2: float


@dataclass(frozen=True)
class DecayCurve:
    """Mean attention against distance: over all layers, and for every layer (``layers`` [L, distances])."""

    axis: str
    distance: list[int]
    mean: list[float]
    layers: list[list[float]]
    fit: Fit | None
    uniform: float
    """What attention spread evenly over all tokens would be."""


@dataclass
class Profile:
    """Attention summed by distance, and the number of pairs in each sum: {(axis, layer): [distance]}."""

    sums: dict[tuple[str, int], Floats] = field(default_factory=dict)
    counts: dict[tuple[str, int], Floats] = field(default_factory=dict)
    tokens: int = 0

    def add(self, axis: str, layer: int, distance: Tensor, weight: Tensor) -> None:
        """Count attention weights (float [...]) of pairs at these distances (int64 [...])."""
        for table, values in ((self.sums, weight), (self.counts, torch.ones_like(weight))):
            binned = torch.bincount(distance.flatten(), values.flatten().double()).cpu().numpy()
            table[axis, layer] = _stack([table.get((axis, layer), np.zeros(0)), binned]).sum(0)

    def curves(self) -> list[DecayCurve]:
        """One curve for every axis that was seen."""
        return [self._curve(axis) for axis in AXES if any(key[0] == axis for key in self.sums)]

    def _curve(self, axis: str) -> DecayCurve:
        layers = sorted(layer for name, layer in self.sums if name == axis)
        sums = _stack([self.sums[axis, layer] for layer in layers])
        counts = _stack([self.counts[axis, layer] for layer in layers])
        seen = counts.sum(0) > 0
        if axis != "time":
            seen[SPATIAL_REACH + 1 :] = False
        distance = np.flatnonzero(seen)
        mean = sums.sum(0)[distance] / counts.sum(0)[distance]
        by_layer = sums[:, distance] / counts[:, distance].clip(min=1)
        return DecayCurve(
            axis, distance.tolist(), mean.tolist(), by_layer.tolist(), fit(distance, mean), 1 / self.tokens
        )


@dataclass(frozen=True, kw_only=True)
class DecayObserver:
    """Notes where attention goes, for a ``Probe``.

    queries: query tokens drawn a call, from the grid's tokens. seed: of the draw.

    Scores are q k^T / sqrt(head_dim), as diffusers' self-attention has them; every head counts alike.
    """

    queries: int = 32
    seed: int = 0
    profile: Profile = field(default_factory=Profile, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.queries < 1:
            raise ValueError(f"queries = {self.queries} must be at least 1")

    def see(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> None:
        grid, start = call.sequence.grid, call.sequence.video_start
        query_R = draw(self.queries, grid.tokens, call, self.seed).to(q_BHND.device)
        rows_RN = mean_attention(q_BHND[:, :, start + query_R], k_BHND)
        video_RFS = rows_RN[:, start : start + grid.tokens].reshape(-1, grid.frames, grid.frame_tokens)
        self.profile.tokens = call.sequence.tokens
        for axis, (distance, weight) in by_distance(call.sequence, query_R, video_RFS).items():
            self.profile.add(axis, call.layer, distance, weight)


def mean_attention(q_BHRD: Tensor, k_BHND: Tensor) -> Tensor:
    """Attention of some queries to all keys, mean over batch and heads: float32 [R, N]."""
    q, k = q_BHRD.flatten(0, 1), k_BHND.flatten(0, 1)
    maps, rows, dim = q.shape
    total_RN = torch.zeros(rows, k.shape[1], device=q.device)
    at_once = max(1, SCRATCH_BYTES // (4 * k.shape[1] * (rows + dim)))
    for first in range(0, maps, at_once):
        part = slice(first, first + at_once)
        scores = q[part].float() @ k[part].float().mT * dim**-0.5
        total_RN += scores.softmax(-1).sum(0)
    return total_RN / maps


def by_distance(sequence: Sequence, query_R: Tensor, rows_RFS: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Attention of drawn queries by distance: for every axis, distances and weights of its pairs.

    ``query_R``: raster index of every query; ``rows_RFS``: its attention to the grid's tokens.
    """
    grid, device = sequence.grid, rows_RFS.device
    each = torch.arange(len(query_R), device=device)
    frame, place = query_R // grid.frame_tokens, query_R % grid.frame_tokens
    other_frame, other = torch.arange(grid.frames, device=device), torch.arange(grid.frame_tokens, device=device)
    down = place[:, None] // grid.width - other // grid.width
    across = place[:, None] % grid.width - other % grid.width
    own_RS = rows_RFS[each, frame]
    return {
        "time": ((frame[:, None] - other_frame).abs(), rows_RFS[each, :, place]),
        "raster": ((place[:, None] - other).abs(), own_RS),
        "space": (torch.hypot(down.float(), across.float()).round().long(), own_RS),
    }


def fit(distance: NDArray[np.int64], mean: Floats) -> Fit | None:
    """The exponential through a curve; ``None`` below three distances with any attention at all."""
    x, y = distance[mean > 0].astype(float), mean[mean > 0]
    if len(x) < 3:
        return None
    log_y = np.log(y)
    slope, offset = np.polyfit(x, log_y, 1)
    unexplained = np.square(log_y - (slope * x + offset)).sum()
    variance = np.square(log_y - log_y.mean()).sum()
    return Fit(float(-slope), float(offset), float(1 - unexplained / variance) if variance else 1.0)


def _stack(rows: list[Floats]) -> Floats:
    """Rows of unequal length as one array, zeros where a row has ended."""
    stacked = np.zeros((len(rows), max(map(len, rows))))
    for row, values in zip(stacked, rows, strict=True):
        row[: len(values)] = values
    return stacked
