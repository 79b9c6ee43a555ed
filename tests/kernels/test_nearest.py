"""k-means' step in C++: the same labels as scores written out, ties and all, whatever the sizes and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff.kernels import cpu_simd, nearest
from falloff.methods import kmeans as plain
from falloff.methods.kmeans import kmeans

pytestmark = pytest.mark.skipif(cpu_simd.absent() is not None, reason=str(cpu_simd.absent()))


def whole(generator: torch.Generator, *shape: int) -> Tensor:
    """Small whole numbers, whose sums and products are exact, so that there are ties and no rounding."""
    return torch.randint(-3, 4, shape, generator=generator).float()


@pytest.mark.parametrize(
    ("heads", "tokens", "channels", "centers"),
    [(1, 1, 1, 1), (3, 100, 5, 7), (2, 431, 32, 272), (2, 50, 40, 64), (1, 20, 3, 17)],
)
def test_labels_sums_and_sizes_are_those_of_scores_written_out(
    heads: int, tokens: int, channels: int, centers: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = whole(generator, tokens, heads, channels).transpose(0, 1)
    offset, bias = whole(generator, heads, centers, channels), whole(generator, heads, centers)
    found = nearest.assign(x, offset, bias)
    scores = x @ offset.mT - bias[:, None]
    first = torch.from_numpy(scores.numpy().argmax(-1))
    member = torch.nn.functional.one_hot(first, centers).float()
    assert torch.equal(found.labels.long(), first)
    assert torch.equal(found.sums, member.mT @ x)
    assert torch.equal(found.sizes, member.sum(1).long())
    assert found.finite


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_one_token_that_is_not_finite_or_too_large_is_told(poison: float) -> None:
    x, offset, bias = torch.ones(2, 30, 4), torch.full((2, 3, 4), 7.5), torch.zeros(2, 3)
    assert nearest.assign(x, offset, bias).finite
    x[1, 29, 3] = poison
    assert not nearest.assign(x, offset, bias).finite


def test_the_number_of_threads_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    call = [torch.randn(*shape, generator=generator) for shape in ((5, 900, 32), (5, 60, 32), (5, 60))]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(nearest.assign(*call))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_clusters_are_those_found_without_a_compiler(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, 3, 200, 8, generator=generator)
    start = x[:, :, ::20]
    found = kmeans(x, start, iterations)
    monkeypatch.setattr(plain.nearest, "runs", lambda x: False)
    for got, expected in zip(found, kmeans(x, start, iterations), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("dtype", "runs"), [(torch.float32, True), (torch.float64, False), (torch.bfloat16, False)])
def test_it_serves_float32(dtype: torch.dtype, runs: bool) -> None:
    assert nearest.runs(torch.zeros(1, 2, 3, dtype=dtype)) == runs
