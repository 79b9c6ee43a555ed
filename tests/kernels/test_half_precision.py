"""What must hold for every kernel, for those that compute in half precision alone: within what that leaves."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import qkv, random_map, uniform_plan
from torch import Tensor

from falloff.kernels import cpu_amx, cpu_tile, merge, run
from falloff.plan import BlockMap, Plan, dense_plan

ABSENT = {"cpu-amx": cpu_amx.absent(), "cpu-tile": cpu_tile.absent()}
HALF = [("cpu-amx", torch.bfloat16), ("cpu-amx", torch.float16), ("cpu-tile", torch.bfloat16)]
every_kernel = pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        pytest.param(*each, marks=pytest.mark.skipif(ABSENT[each[0]] is not None, reason=str(ABSENT[each[0]])))
        for each in HALF
    ],
)
LSE = {"cpu-amx": 1e-4, "cpu-tile": 0.06}
"""Error of the LSE: a tile's scores are themselves bfloat16."""


def halved(seed: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    return [x.to(dtype) for x in qkv(seed, *shape)]


def softmax(mask: Tensor, low: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Out and LSE in float64 of the keys that the mask [B, H, N, M] keeps, and the error of out, as a norm, that comes
    of weights and results in half precision."""
    q, k, v = (x.double() for x in low)
    logits = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    weights, dtype = logits.softmax(-1).nan_to_num(), low[0].dtype  # a row without keys is 0
    rounded = (weights.to(dtype).double() @ v).to(dtype)
    return weights @ v, logits.logsumexp(-1), (rounded - weights @ v).norm()


def assert_softmax(impl: str, plan: Plan, low: list[Tensor]) -> None:
    got, got_lse = run(plan, *low, impl=impl)
    heads = low[0].shape[:2]
    out, lse, error = softmax(plan.mask().expand(*heads, -1, -1), low)
    assert (got.dtype, got_lse.dtype) == (low[0].dtype, torch.float32)
    assert (got - out).norm() <= 2.2 * error + 1e-6  # where one key is all there is, nothing is rounded
    assert torch.equal(got_lse.isinf(), lse.isinf())
    torch.testing.assert_close(got_lse.double(), lse, rtol=0, atol=LSE[impl])


@every_kernel
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(("maps", "density"), [((), 0.1), ((1, 2), 0.5), ((2, 1), 0.8), ((2, 2), 1.0)])
def test_many_lengths(impl: str, dtype: torch.dtype, length: int, size: int, maps: tuple, density: float) -> None:
    blocks = random_map(length, *maps, -(-length // size), -(-77 // size), density=density)
    assert_softmax(impl, uniform_plan(blocks, length, 77, size), halved(7, 2, 2, length, 77, 32, dtype=dtype))


@every_kernel
def test_lengths_one_after_the_other(impl: str, dtype: torch.dtype) -> None:
    for length in (*range(90, 1001, 90), 1000):
        blocks = random_map(length, 2, -(-length // 64), -(-length // 64), density=0.3)
        assert_softmax(
            impl, uniform_plan(blocks, length, length, 64), halved(15, 1, 2, length, length, 32, dtype=dtype)
        )


@every_kernel
def test_a_diagonal_map_is_attention_inside_each_block(impl: str, dtype: torch.dtype) -> None:
    low = halved(2, 1, 2, 64, 64, 32, dtype=dtype)
    out, lse = run(uniform_plan(torch.eye(4, dtype=torch.bool), 64, 64, 16), *low, impl=impl)
    for start in range(0, 64, 16):
        alone = [x[:, :, start : start + 16] for x in low]
        true, true_lse, error = softmax(torch.ones(1, 2, 16, 16, dtype=torch.bool), alone)
        assert (out[:, :, start : start + 16] - true).norm() <= 2.2 * error
        torch.testing.assert_close(lse[:, :, start : start + 16].double(), true_lse, rtol=0, atol=LSE[impl])


@every_kernel
def test_permuting_heads_with_their_maps_permutes_the_output(impl: str, dtype: torch.dtype) -> None:
    low, blocks, turn = halved(3, 1, 3, 60, 60, 32, dtype=dtype), random_map(4, 3, 4, 4), torch.tensor([2, 0, 1])
    straight = run(uniform_plan(blocks, 60, 60, 16), *low, impl=impl)
    turned = run(uniform_plan(blocks[turn], 60, 60, 16), *(x[:, turn] for x in low), impl=impl)
    assert all(torch.equal(a[:, turn], b) for a, b in zip(straight, turned, strict=True))


@every_kernel
def test_an_empty_row_gives_zero_and_minus_infinity(impl: str, dtype: torch.dtype) -> None:
    blocks = torch.tensor([[True, False, True], [False, False, False], [True, True, False]])
    out, lse = run(uniform_plan(blocks, 24, 24, 8), *halved(5, 1, 1, 24, 24, 16, dtype=dtype), impl=impl)
    assert not out[:, :, 8:16].any()
    assert (lse[:, :, 8:16] == -torch.inf).all()
    assert lse[:, :, [*range(8), *range(16, 24)]].isfinite().all()


@every_kernel
def test_a_tail_of_one_token_gives_its_value(impl: str, dtype: torch.dtype) -> None:
    q, k, v = halved(6, 1, 1, 17, 17, 16, dtype=dtype)
    blocks = torch.zeros(3, 3, dtype=torch.bool)
    blocks[:, 2] = True
    out, lse = run(uniform_plan(blocks, 17, 17, 8), q, k, v, scale=0.5, impl=impl)
    torch.testing.assert_close(out, v[:, :, 16:].expand_as(out), rtol=0, atol=0)
    scores = 0.5 * (q.double() * k[:, :, 16:].double()).sum(-1)
    torch.testing.assert_close(lse.double(), scores, rtol=0, atol=LSE[impl])


@every_kernel
def test_two_maps_without_common_blocks_merge_to_what_both_see(impl: str, dtype: torch.dtype) -> None:
    low = halved(8, 1, 2, 150, 150, 32, dtype=dtype)
    blocks, coin = random_map(3, 2, 5, 5), random_map(4, 2, 5, 5, density=0.5)
    parts = [uniform_plan(b, 150, 150, 32) for b in (blocks, ~blocks & coin)]
    union = uniform_plan(blocks | coin, 150, 150, 32)
    out, lse = merge(*(run(plan, *low, impl=impl) for plan in parts))
    true, true_lse, error = softmax(union.mask().expand(1, 2, -1, -1), low)
    assert (out - true).norm() <= 3 * error  # every branch is rounded before, and its weight by its LSE
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=LSE[impl])


@every_kernel
def test_a_new_map_of_the_same_shape_changes_the_output(impl: str, dtype: torch.dtype) -> None:
    low = halved(8, 1, 1, 64, 64, 16, dtype=dtype)
    first, second = (run(uniform_plan(random_map(s, 4, 4), 64, 64, 16), *low, impl=impl)[0] for s in (1, 2))
    assert not torch.allclose(first, second)


@every_kernel
def test_variable_sizes(impl: str, dtype: torch.dtype) -> None:
    """Equal ones are uniform blocks, bit for bit; others, of one token too, are what the mask says."""
    low = halved(9, 1, 2, 48, 48, 16, dtype=dtype)
    blocks = BlockMap.from_dense(random_map(9, 2, 6, 6) | torch.eye(6, dtype=torch.bool))
    results = []
    for sizes in (torch.full((6,), 8), 8):
        plan = Plan(q_len=48, kv_len=48, q_sizes=sizes, kv_sizes=sizes, blocks=blocks)
        results.append(run(plan, *low, impl=impl))
    for got, uniform in zip(*results, strict=True):
        torch.testing.assert_close(got, uniform, rtol=0, atol=0)
    uneven = torch.tensor([1, 17, 1, 8, 20, 1])
    assert_softmax(impl, Plan(q_len=48, kv_len=48, q_sizes=uneven, kv_sizes=uneven, blocks=blocks), low)


@every_kernel
def test_the_whole_map_is_dense_attention(impl: str, dtype: torch.dtype) -> None:
    low = halved(1, 2, 3, 65, 65, 32, dtype=dtype)
    out, lse = run(dense_plan(65, 65, 32), *low, key_valid=torch.ones(2, 65, dtype=torch.bool), impl=impl)
    true, true_lse, error = softmax(torch.ones(2, 3, 65, 65, dtype=torch.bool), low)
    assert (out - true).norm() <= 2.2 * error
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=LSE[impl])
