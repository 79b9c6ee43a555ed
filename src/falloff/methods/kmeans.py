"""Euclidean k-means over the tokens of every head at once (Lloyd's algorithm), in little memory and deterministic.

A token x joins the centroid c of least distance, ties to the lower index; a centroid then moves to the mean of its
tokens, and stays where it is when it has none. |x|^2 is the same for every centroid, so the nearest one is found from

    argmax_j  x . d_j - (|d_j|^2 / 2 + mu . d_j),     d_j = c_j - mu,

mu the mean of the head's centroids: a common offset of all tokens, as keys have it, then costs no precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from falloff.kernels import nearest
from falloff.kernels.groups import Group, groups_within, head_groups
from falloff.kernels.product import product

CHUNK_BYTES = 32 << 20
"""Scores, memberships and copies of tokens held at once."""
CPU_CHUNK_BYTES = 2 << 20
"""The same on CPUs, where passes over scores that have left a core's cache would be half of the time."""
SORT_BYTES, SORTED_BYTES = 40, 16 << 20
"""Of one token while it is sorted: its cluster and its place, twice, and what the sort needs on the way; of all."""
SUM_BYTES = 8 << 20
"""Sums of tokens by cluster held at once, the old and the new."""


class Clusters(NamedTuple):
    """``labels`` int32 [B, H, N]; ``centroids`` [B, H, C, D], float32 (float64 for float64); ``sizes`` int64 [B, H, C].

    ``finite``: whether all tokens were finite, 0-d bool on their device; the rest means nothing where they were not.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    finite: Tensor

    def order(self) -> Tensor:
        """Tokens cluster by cluster, in the given order inside each: int64 [B, H, N]."""
        batch, heads, length = self.labels.shape
        order = torch.empty(self.labels.shape, dtype=torch.int64, device=self.labels.device)
        for group in groups_within(batch, heads, SORT_BYTES * length, SORTED_BYTES):
            order[group] = self.order_of(group)
        return order

    def order_of(self, group: Group) -> Tensor:
        """The same of some heads, int64 [h, N]."""
        labels = self.labels[group]
        if labels.device.type == "cpu":  # NumPy sorts numbers of two bytes by their digits, several times faster
            narrow = labels.numpy().astype(np.min_scalar_type(self.sizes.shape[2] - 1))
            return torch.from_numpy(np.argsort(narrow, -1, kind="stable"))
        return labels.sort(dim=-1, stable=True).indices


class Chunks(NamedTuple):
    """How many heads and tokens are looked at together."""

    heads: int
    tokens: int


@torch.no_grad()
def kmeans(x_BHND: Tensor, centroids_BHCD: Tensor, iterations: int, *, stride: int = 1) -> Clusters:
    """Improve centroids ``iterations`` times, then tell every token's cluster.

    The last iteration takes all tokens, so that centroids are the means of the clusters returned; those before take
    every ``stride``-th. Without iterations tokens are assigned to the centroids as given. Each (batch entry, head) is
    on its own, bit for bit.
    """
    batch, heads, length, _ = x_BHND.shape
    clusters = centroids_BHCD.shape[2]
    centroids = centroids_BHCD.to(torch.promote_types(x_BHND.dtype, torch.float32), copy=True)
    labels = torch.empty(batch, heads, length, dtype=torch.int32, device=x_BHND.device)
    sizes = torch.empty(batch, heads, clusters, dtype=torch.int64, device=x_BHND.device)
    finite = torch.ones((), dtype=torch.bool, device=x_BHND.device)
    chunks = _chunks(x_BHND, clusters)
    for group in head_groups(batch, heads, chunks.heads):
        x, center = x_BHND[group], centroids[group]
        for _ in range(iterations - 1):
            _improve(x[:, ::stride], center, chunks.tokens)
        if iterations:
            sizes[group] = _improve(x, center, chunks.tokens, labels[group], finite)
        else:
            sizes[group] = _members(x, center, chunks.tokens, labels[group], finite)[1]
    return Clusters(labels, centroids, sizes, finite)


@torch.no_grad()
def first_centroids(
    x_BHND: Tensor, clusters: int, seed: int = 0, *, order_N: Tensor | None = None, parts: int = 1
) -> Tensor:
    """Means of neighbours, in float32 (float64 for float64): [B, H, C, D].

    Tokens along ``order_N`` (``None``: as given) are ``parts`` of equal length, a video's frames, and each is cut into
    equal stretches, the first up to a quarter shorter as the seed draws. Neighbours are alike, so that a few iterations
    from here reach further than many from single tokens. Raises ``ValueError`` for more clusters than tokens.
    """
    batch, heads, length, head_dim = x_BHND.shape
    if not 1 <= clusters <= length:
        raise ValueError(f"{clusters} clusters of {length} tokens: use 1 to {length} clusters")
    earlier = int(torch.randint(1 + length // (4 * clusters), (), generator=torch.Generator().manual_seed(seed)))
    first = torch.arange(parts + 1, device=x_BHND.device)[:, None] * clusters // parts
    count = first.diff(dim=0)
    place = torch.arange(length // parts, device=x_BHND.device) + earlier
    stretch = (first[:-1] + (place * count // len(place)).minimum((count - 1).clamp(min=0))).flatten()
    sizes = torch.bincount(stretch, minlength=clusters)
    label = stretch if order_N is None else torch.empty_like(stretch).index_copy_(0, order_N, stretch)
    exact = torch.promote_types(x_BHND.dtype, torch.float32)
    centroids = torch.zeros(batch, heads, clusters, head_dim, dtype=exact, device=x_BHND.device)
    chunks = _chunks(x_BHND, clusters)
    for group in head_groups(batch, heads, chunks.heads):
        x, sums = x_BHND[group], centroids[group]
        for start in range(0, length, chunks.tokens):
            part = x[:, start : start + chunks.tokens]
            _add_members(sums, part, label[start : start + chunks.tokens].expand(len(part), -1))
        sums /= sizes[:, None]
    return centroids


def chunks_for(heads: int, head_dim: int, clusters: int) -> Chunks:
    """Heads whose sums fit ``SUM_BYTES``, and tokens of theirs whose scores fit ``CHUNK_BYTES``; at least one each."""
    together = min(heads, max(1, SUM_BYTES // (2 * _SIZE * clusters * head_dim)))
    return Chunks(together, max(1, CHUNK_BYTES // (together * _token_bytes(head_dim, clusters))))


def _chunks(x_BHND: Tensor, clusters: int) -> Chunks:
    """Those of ``chunks_for``, but fewer tokens on a CPU."""
    most = chunks_for(x_BHND.shape[1], x_BHND.shape[3], clusters)
    if x_BHND.device.type != "cpu":
        return most
    in_cache = CPU_CHUNK_BYTES // (most.heads * _token_bytes(x_BHND.shape[3], clusters))
    return Chunks(most.heads, min(most.tokens, max(1, in_cache)))


def extra_bytes(batch: int, heads: int, length: int, head_dim: int, clusters: int) -> int:
    """Peak memory of ``kmeans`` beside its input, in float32: what it returns and what it works with."""
    chunks = chunks_for(heads, head_dim, clusters)
    returned = batch * heads * (4 * length + (_SIZE * head_dim + 8) * clusters)
    sums = 2 * _SIZE * chunks.heads * clusters * head_dim
    return returned + sums + chunks.heads * min(chunks.tokens, length) * _token_bytes(head_dim, clusters)


_SIZE = 4
"""Bytes of a float32."""


def _token_bytes(head_dim: int, clusters: int) -> int:
    """Of one token of one head: its scores, its membership, a copy of it, its best score, its cluster and a one."""
    return 2 * _SIZE * clusters + _SIZE * head_dim + 4 + 8 + 8


def _improve(
    x: Tensor, center: Tensor, tokens: int, labels: Tensor | None = None, finite: Tensor | None = None
) -> Tensor:
    """Move centers [heads, C, D] in place to the means of their tokens [heads, N, D]; how many each has."""
    sums, sizes = _members(x, center, tokens, labels, finite)
    sums /= sizes.clamp(min=1)[..., None]
    torch.where(sizes[..., None] > 0, sums, center, out=center)
    return sizes


def _members(
    x: Tensor, center: Tensor, tokens: int, labels: Tensor | None, finite: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of every center the sum of its tokens and their number; these are noted in ``labels`` where they are given."""
    if center.dtype == x.dtype and nearest.runs(x):
        found = nearest.assign(x, *_offsets(x, center))
        if labels is not None and finite is not None:
            labels.copy_(found.labels)
            finite &= found.finite
        return found.sums, found.sizes
    sums, sizes = torch.zeros_like(center), _no_tokens(center)
    for part, place in _nearest(x, center, tokens, labels, finite):
        _add_members(sums, part, place)
        sizes.scatter_add_(1, place, torch.ones_like(place))
    return sums, sizes


def _add_members(sums: Tensor, part: Tensor, nearest: Tensor) -> None:
    """Add tokens [heads, n, D] to the sums of their centers [heads, C, D], in an order that is fixed."""
    heads, clusters, head_dim = sums.shape
    if part.device.type == "cpu":
        place = nearest + clusters * torch.arange(heads)[:, None]
        sums.view(-1, head_dim).index_add_(0, place.flatten(), part.reshape(-1, head_dim).to(sums.dtype))
        return
    # by a product, since adding by index is not deterministic on GPUs
    member = torch.zeros(*nearest.shape, clusters, dtype=part.dtype, device=part.device)
    member.scatter_(2, nearest[..., None], 1)
    sums += product(member.mT, part)


def _nearest(
    x: Tensor, center: Tensor, tokens: int, labels: Tensor | None, finite: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of tokens with the index of their nearest center [heads, n]; noted in ``labels`` where these are given."""
    offset, bias = _offsets(x, center)
    for start in range(0, x.shape[1], tokens):
        part = x[:, start : start + tokens]
        closeness = product(part, offset.mT).sub_(bias[:, None])
        place = _highest(closeness)
        if labels is not None and finite is not None:
            labels[:, start : start + tokens] = place
            finite &= closeness.gather(2, place[..., None]).isfinite().all()
        yield part, place


def _offsets(x: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
    """d_j [heads, C, D] of the module's docstring, and what is taken off its product [heads, C]."""
    mu = center.mean(1, keepdim=True)
    offset = (center - mu).to(x.dtype)  # multiplied in the tokens' precision, and consistent with that below
    exact = offset.to(center.dtype)
    return offset, (exact.square() / 2 + mu * exact).sum(-1)


def _highest(x: Tensor) -> Tensor:
    """The place of the highest number of every row, NaN the highest of all; ties to the first."""
    if x.device.type == "cpu":  # NumPy's search is several times faster there
        return torch.from_numpy(np.argmax(x.numpy(), -1))
    return x.max(-1).indices


def _no_tokens(center: Tensor) -> Tensor:
    return torch.zeros(center.shape[:2], dtype=torch.int64, device=center.device)
