"""The look in C++: the error that leaving keys to their block's mean makes, as PyTorch computes it in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff.kernels import cpu_simd, look
from falloff.methods import contour

pytestmark = pytest.mark.skipif(cpu_simd.absent() is not None, reason=str(cpu_simd.absent()))


def case(batch: int, heads: int, keys: int, channels: int, rows: int, blocks: int, seed: int = 0) -> list[Tensor]:
    """Queries looked at, keys that do not lie together, an order of them, and sizes of blocks, some of them empty."""
    draw = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, heads, rows, channels, generator=draw)
    k = torch.randn(batch, keys, heads, channels, generator=draw).transpose(1, 2)
    order = torch.rand(batch, heads, keys, generator=draw).argsort(-1)
    block = torch.randint(0, blocks, (batch, heads, keys), generator=draw)
    block[block == 1] = 0
    sizes = torch.nn.functional.one_hot(block, blocks).sum(2)
    return [q, k, order, sizes]


@pytest.mark.parametrize(
    ("shape", "each"),
    [
        ((2, 3, 100, 20, 35, 9), 7),
        ((1, 2, 431, 32, 26, 3), 13),
        ((1, 1, 5, 3, 1, 2), 1),
        ((1, 1, 300, 130, 12, 40), 12),
    ],
)
def test_equals_what_float64_gives(shape: tuple[int, ...], each: int) -> None:
    q, k, order, sizes = case(*shape)
    found = contour.spared(q, k, order, sizes, each)
    assert look.runs(k)  # so that it was the C++
    assert found.dtype == torch.float32
    exact = contour.spared(q.double(), k.double(), order, sizes, each)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-6 * float(exact.max()))
    assert (found[(sizes == 0)[..., None, :].expand_as(found)] == 0).all()


def test_large_scores_overflow_nothing() -> None:
    q, k, order, sizes = case(1, 2, 200, 16, 8, 6)
    found = contour.spared(1000 * q, k, order, sizes, 4)
    exact = contour.spared(1000 * q.double(), k.double(), order, sizes, 4)
    torch.testing.assert_close(found.double(), exact, rtol=1e-2, atol=1e-4)


def test_the_number_of_threads_changes_no_bit() -> None:
    given = case(1, 3, 900, 32, 120, 30, seed=1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(look.spared(*given, 12, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_are_not_for_it(dtype: torch.dtype) -> None:
    assert not look.runs(torch.zeros(1, 1, 2, 2, dtype=dtype))
