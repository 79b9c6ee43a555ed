"""Clustering: Lloyd's promises, written-out small cases, and the memory it may take."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from falloff.methods import kmeans as module
from falloff.methods.kmeans import Clusters, extra_bytes, first_centroids, kmeans


def tokens(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inertia(x: Tensor, found: Clusters) -> float:
    own = found.centroids.gather(2, found.labels.long()[..., None].expand(*x.shape))
    return float((x - own).square().sum())


def lloyd(x_ND: Tensor, centroids_CD: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """The textbook, one head, one centroid at a time."""
    centroids = centroids_CD.clone()
    for _ in range(iterations):
        labels = torch.cdist(x_ND, centroids).argmin(1)
        for j in range(len(centroids)):
            if (labels == j).any():
                centroids[j] = x_ND[labels == j].mean(0)
    return labels, centroids


@pytest.mark.parametrize("chunk_bytes", [1, 4000, module.CHUNK_BYTES])
@pytest.mark.parametrize("sum_bytes", [1, module.SUM_BYTES])
def test_equals_the_textbook_in_every_head(monkeypatch: pytest.MonkeyPatch, chunk_bytes: int, sum_bytes: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(module, "SUM_BYTES", sum_bytes)
    x = tokens(2, 3, 41, 5, dtype=torch.float64)
    start = first_centroids(x, 7)
    found = kmeans(x, start, 4)
    for b in range(2):
        for h in range(3):
            labels, centroids = lloyd(x[b, h], start[b, h], 4)
            assert torch.equal(found.labels[b, h].long(), labels)
            torch.testing.assert_close(found.centroids[b, h], centroids)
            assert torch.equal(found.sizes[b, h], labels.bincount(minlength=7))
    order = found.order()
    assert (found.labels.gather(2, order).diff() >= 0).all()
    same = found.labels.gather(2, order).diff() == 0
    assert (order.diff()[same] > 0).all()  # tokens of a cluster keep their order


def test_inertia_never_rises() -> None:
    x = tokens(1, 2, 200, 8)
    start = first_centroids(x, 12)
    falling = [inertia(x, kmeans(x, start, n)) for n in range(1, 8)]
    assert all(b <= a + 1e-3 for a, b in itertools.pairwise(falling))
    assert falling[-1] < 0.95 * falling[0]


def test_well_separated_points_stay_with_their_true_centroids() -> None:
    centers = 20 * torch.eye(4)[None, None]
    x = (centers[..., None, :] + 0.1 * tokens(1, 1, 4, 9, 4)).flatten(2, 3)
    found = kmeans(x, centers, 1)
    assert torch.equal(found.labels[0, 0], torch.arange(4, dtype=torch.int32).repeat_interleave(9))
    again = kmeans(x, found.centroids, 1)
    assert torch.equal(again.labels, found.labels)
    torch.testing.assert_close(again.centroids, found.centroids)


def test_an_empty_cluster_keeps_its_centroid() -> None:
    x = tokens(1, 1, 30, 4)
    start = first_centroids(x, 3)
    start[0, 0, 2] = start[0, 0, 1]
    found = kmeans(x, start, 1)
    assert found.sizes[0, 0, 2] == 0
    assert torch.equal(found.centroids[0, 0, 2], start[0, 0, 2])
    assert int(found.sizes.sum()) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_common_offset_changes_no_label(dtype: torch.dtype) -> None:
    x = (8 * tokens(1, 2, 300, 16)).round() / 8  # exact in both precisions, offset or not
    start = first_centroids(x, 10)
    plain = kmeans(x.to(dtype), start, 1)
    moved = kmeans((x + 8).to(dtype), start + 8, 1)
    assert torch.equal((x + 8).to(dtype).float() - 8, x)
    assert torch.equal(moved.labels, plain.labels)


def test_half_precision_clusters_nearly_as_well() -> None:
    x = tokens(1, 2, 400, 16, dtype=torch.bfloat16)
    start = first_centroids(x, 20)
    low, exact = kmeans(x, start, 5), kmeans(x.float(), start, 5)
    assert low.centroids.dtype == torch.float32
    assert inertia(x.float(), low) <= 1.01 * inertia(x.float(), exact)


def test_without_iterations_tokens_are_assigned_to_the_centroids_as_given() -> None:
    x = tokens(1, 2, 50, 4)
    start = first_centroids(x, 6, seed=3)
    found = kmeans(x, start, 0)
    assert torch.equal(found.labels.long(), torch.cdist(x, start).argmin(-1))
    assert torch.equal(found.centroids, start)
    assert torch.equal(found.sizes.sum(-1), torch.tensor([[50, 50]]))


def test_a_stride_improves_on_some_tokens_and_assigns_all() -> None:
    x = tokens(1, 2, 90, 4)
    start = first_centroids(x, 5)
    some = kmeans(x[:, :, ::3].contiguous(), start, 3).centroids
    expected, found = kmeans(x, some, 1), kmeans(x, start, 4, stride=3)
    assert torch.equal(found.labels, expected.labels)
    assert torch.equal(found.centroids, expected.centroids)
    assert not torch.equal(found.labels, kmeans(x, start, 4).labels)


def test_a_batch_of_two_is_two_batches_of_one_and_the_seed_decides() -> None:
    x = tokens(2, 3, 64, 8)
    both = kmeans(x, first_centroids(x, 9), 3)
    for b in range(2):
        alone = kmeans(x[b : b + 1], first_centroids(x[b : b + 1], 9), 3)
        assert torch.equal(alone.labels[0], both.labels[b])
        assert torch.equal(alone.centroids[0], both.centroids[b])
    assert torch.equal(first_centroids(x, 9, seed=1), first_centroids(x, 9, seed=1))
    assert not torch.equal(first_centroids(x, 9, seed=1), first_centroids(x, 9, seed=2))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_are_told(poison: float) -> None:
    x = tokens(1, 2, 40, 4)
    start = first_centroids(x, 4)
    assert kmeans(x, start, 2).finite
    x[0, 1, 39, 2] = poison
    assert not kmeans(x, start, 2).finite
    assert not kmeans(x, start, 0).finite


@pytest.mark.parametrize(("clusters", "parts"), [(1, 4), (3, 4), (4, 4), (7, 4), (13, 4), (24, 4), (5, 1), (24, 1)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_first_centroids_are_means_of_stretches_that_end_with_a_part(clusters: int, parts: int, seed: int) -> None:
    length = 24
    order = torch.randperm(length, generator=torch.Generator().manual_seed(5))
    marks = torch.eye(length, dtype=torch.float64)[None, None]  # a mean then tells of which tokens it is
    found = first_centroids(marks, clusters, seed, order_N=order, parts=parts)[0, 0]
    assert ((found > 0).sum(0) == 1).all()  # each token is in one cluster
    torch.testing.assert_close(found.sum(1), torch.ones(clusters, dtype=torch.float64))  # of which none is empty
    label = (found > 0).int().argmax(0)[order]  # along the order
    assert (label.diff() >= 0).all()
    if clusters >= parts:
        ends = torch.arange(1, parts) * length // parts
        assert (label[ends] > label[ends - 1]).all()
    for stretch in label.unique():
        weights = found[stretch][found[stretch] > 0]
        torch.testing.assert_close(weights, torch.full_like(weights, 1 / len(weights)))


def test_the_first_centroids_are_the_same_in_chunks_and_the_seed_moves_the_cuts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = tokens(2, 3, 120, 4, dtype=torch.float64)
    found = [first_centroids(x, 5, seed) for seed in range(4)]
    assert any(not torch.equal(found[0], other) for other in found[1:])
    monkeypatch.setattr(module, "CPU_CHUNK_BYTES", 1)
    monkeypatch.setattr(module, "SUM_BYTES", 1)
    torch.testing.assert_close(first_centroids(x, 5), found[0])


@pytest.mark.parametrize("clusters", [5, 300])
def test_the_order_is_the_stable_one(clusters: int) -> None:
    x = tokens(1, 2, 900, 3)
    found = kmeans(x, first_centroids(x, clusters), 1)
    assert torch.equal(found.order(), found.labels.sort(dim=-1, stable=True).indices)


def test_more_clusters_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="41 clusters of 40 tokens: use 1 to 40"):
        first_centroids(tokens(1, 1, 40, 4), 41)


@pytest.mark.parametrize("clusters", [100, 300, 500, 1000])
def test_it_takes_little_memory_at_full_size(clusters: int) -> None:
    assert extra_bytes(1, 40, 75_600, 128, clusters) < 100e6


class Peak(TorchDispatchMode):
    """The most bytes alive at once in storages that operators made, those of ``given`` left out."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.alive: dict[int, int] = {x.untyped_storage()._cdata: 0 for x in given}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self._watch(x.untyped_storage())
        return out

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.alive:
            self.alive[key] = storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key, None)
            self.most = max(self.most, sum(self.alive.values()))


def test_the_memory_told_is_the_memory_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", 200_000)
    monkeypatch.setattr(module, "SUM_BYTES", 100_000)
    x = tokens(1, 6, 3000, 16)
    start = first_centroids(x, 64)
    with Peak(x, start) as peak:
        kmeans(x, start, 2)
    told = extra_bytes(1, 6, 3000, 16, 64)
    assert 0.5 * told <= peak.most <= told
