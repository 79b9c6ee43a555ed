"""What a plan refuses, and what it says about itself."""

from __future__ import annotations

import pytest
import torch

from falloff.plan import BlockMap, Plan, PlanError, dense_plan


def plan(**change):
    blocks = BlockMap.from_dense(torch.ones(2, 3, 4, dtype=torch.bool))
    return Plan(**({"q_len": 12, "kv_len": 14, "q_sizes": 4, "kv_sizes": 4, "blocks": blocks} | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_order": torch.zeros(12, dtype=torch.int64)}, "q_order is not a permutation"),
        ({"kv_order": torch.arange(1, 15)}, "kv_order is not a permutation"),
        ({"q_order": torch.arange(12, dtype=torch.int32)}, "q_order must be int64"),
        ({"q_order": torch.arange(12).expand(1, 3, 12)}, "q_order must be int64"),
        ({"q_order": torch.arange(11)}, "q_order must be int64"),
        ({"q_sizes": torch.tensor([4, 4, 3])}, "sum to 12"),
        ({"q_sizes": torch.tensor([14, -2, 0])}, "sum to 12"),
        ({"kv_sizes": torch.tensor([7, 7])}, "kv_sizes must be int64"),
        ({"q_sizes": torch.tensor([4.0, 4.0, 4.0])}, "q_sizes must be int64"),
        ({"q_sizes": 5, "kv_sizes": 3}, "the map has 4"),
        ({"q_sizes": 0}, "at least 1"),
        ({"q_len": 0}, "at least 1"),
    ],
)
def test_a_plan_refuses_what_does_not_fit(change, message):
    with pytest.raises(PlanError, match=message):
        plan(**change)


@pytest.mark.parametrize(
    ("start", "columns", "message"),
    [
        ([0, 2, 3], [1, 1, 0], "ascending and unique"),
        ([0, 2, 3], [1, 0, 0], "ascending and unique"),
        ([0, 2, 3], [0, 3, 1], "lie in 0 to 2"),
        ([0, 2, 3], [-1, 2, 1], "lie in 0 to 2"),
        ([0, 2, 2], [0, 1, 2], "rise from 0"),
        ([0, 4, 3], [0, 1, 2], "rise from 0"),
        ([0, 3], [0, 1, 2], "start must have shape"),
    ],
)
def test_a_block_map_refuses_bad_lists(start, columns, message):
    with pytest.raises(PlanError, match=message):
        BlockMap((1, 1, 2, 3), torch.tensor(start), torch.tensor(columns, dtype=torch.int32))


def test_rows_may_descend_from_one_to_the_next():
    blocks = BlockMap((1, 1, 3, 3), torch.tensor([0, 2, 2, 3]), torch.tensor([1, 2, 0], dtype=torch.int32))
    assert blocks.dense()[0, 0].tolist() == [[False, True, True], [False, False, False], [True, False, False]]


def test_a_complete_plan_needs_a_key_for_every_query_block_that_has_tokens():
    blocks = BlockMap.from_dense(torch.tensor([[True, True], [False, False]]))
    with pytest.raises(PlanError, match="sees no key"):
        Plan(q_len=8, kv_len=8, q_sizes=4, kv_sizes=4, blocks=blocks)
    only_empty_keys = BlockMap.from_dense(torch.tensor([[True, True], [False, True]]))
    with pytest.raises(PlanError, match="sees no key"):
        Plan(q_len=8, kv_len=8, q_sizes=4, kv_sizes=torch.tensor([8, 0]), blocks=only_empty_keys)
    Plan(q_len=8, kv_len=8, q_sizes=torch.tensor([8, 0]), kv_sizes=4, blocks=blocks)
    Plan(q_len=8, kv_len=8, q_sizes=4, kv_sizes=4, blocks=blocks, partial=True)


@pytest.mark.parametrize("stretch", [1, 7, 10**6])
def test_maps_are_worked_through_in_stretches(stretch, monkeypatch):
    monkeypatch.setattr("falloff.plan.STRETCH", stretch)
    draw = torch.Generator().manual_seed(2)
    on = torch.rand(2, 3, 4, 5, generator=draw) < 0.4
    on[1, 2, 1] = False
    blocks = BlockMap.from_dense(on)
    assert blocks.start.tolist() == [0, *on.flatten(0, 2).sum(1).cumsum(0).tolist()]
    assert blocks.columns.tolist() == on.nonzero()[:, 3].tolist()
    assert torch.equal(blocks.dense(), on)
    sizes = torch.randint(0, 9, (2, 3, 5), generator=draw)
    assert torch.equal(blocks.tokens(sizes), (on * sizes[:, :, None]).sum(3).flatten())
    assert torch.equal(blocks.tokens(sizes[:1, :1]), (on * sizes[:1, :1, None]).sum(3).flatten())
    order = torch.stack([torch.randperm(7, generator=draw) for _ in range(6)]).view(2, 3, 7)
    q_sizes = torch.tensor([2, 2, 3, 0])
    made = {"q_len": 7, "kv_len": 13, "q_sizes": q_sizes, "kv_sizes": 3, "blocks": blocks, "partial": True}
    whole = Plan(**made, q_order=order)
    assert whole.pairs == int(
        (on.sum((0, 1))[:, :, None] * torch.tensor([3, 3, 3, 3, 1])[:, None] * q_sizes.view(4, 1, 1)).sum()
    )
    order[1, 2, 6] = order[1, 2, 0]
    with pytest.raises(PlanError, match="q_order is not a permutation"):
        Plan(**made, q_order=order)


def test_refine_keeps_every_pair_and_refuses_other_sizes():
    blocks = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    coarse = Plan(q_len=50, kv_len=40, q_sizes=16, kv_sizes=16, blocks=BlockMap.from_dense(blocks), partial=True)
    fine = coarse.refine(8)
    assert fine.q_sizes == 8
    assert torch.equal(fine.mask(), coarse.mask())
    assert fine.pairs == coarse.pairs == int(coarse.mask().sum())
    wide = Plan(q_len=500, kv_len=300, q_sizes=128, kv_sizes=128, blocks=BlockMap.from_dense(blocks), partial=True)
    assert torch.equal(wide.refine(64).mask(), wide.mask())
    for size in (3, 32):
        with pytest.raises(PlanError, match="cannot be cut"):
            coarse.refine(size)


def test_density_counts_tokens():
    blocks = BlockMap.from_dense(torch.tensor([[True, False], [True, True]]))
    ragged = Plan(q_len=5, kv_len=7, q_sizes=4, kv_sizes=4, blocks=blocks)
    assert ragged.density == pytest.approx((4 * 4 + 1 * 7) / 35)
    assert ragged.flops(batch=2, heads=3, head_dim=8) == 4 * 8 * 23 * 6
    assert dense_plan(5, 7).density == 1


def test_the_transposed_map_is_the_transpose():
    blocks = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.4
    assert torch.equal(BlockMap.from_dense(blocks).transposed.dense(), blocks.mT)
