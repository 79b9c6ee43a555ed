"""The Triton kernel without a GPU: its lists, its door, and its code under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from kernel_cases import Case, cases, qkv, random_map, uniform_plan

from falloff.kernels import UnsupportedError, choose, run, triton, triton_lists
from falloff.kernels.choose import kernel_named
from falloff.kernels.needs import Needs
from falloff.kernels.triton_tiles import HALF, architecture, tile_for
from falloff.plan import BlockMap, Plan, dense_plan

HERE = Path(__file__).parent


def interpreted(*files: str) -> None:
    """Run test files in a process of its own: interpreted and compiled kernels cannot live in one."""
    pytest.importorskip("triton", minversion="3.9", reason="the interpreter of 3.6 fails on NumPy 2.4")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(HERE / file) for file in files)]
    done = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=HERE.parents[1], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_what_holds_for_every_kernel_holds_under_the_interpreter():
    interpreted("test_run.py")


def test_blocks_are_left_out_under_the_interpreter():
    interpreted("test_skip.py")


def test_its_own_paths_hold_under_the_interpreter():
    interpreted("interpreted_triton.py", "interpreted_linear.py")


def tokens_listed(listed: triton_lists.Lists, row: int, length: int) -> list[int]:
    """What a row's list names, token by token."""
    units = listed.entries[listed.start[row] : listed.start[row + 1]].tolist()
    if listed.packed:
        return [token for unit in units for token in range(unit // 32, unit // 32 + unit % 32)]
    return [token for unit in units for token in range(unit * listed.unit, min((unit + 1) * listed.unit, length))]


@settings(max_examples=60, deadline=None)
@given(case=cases())
@pytest.mark.parametrize("side", ["q", "kv"])
def test_tasks_hold_every_token_once_and_lists_what_the_map_says(side, case: Case):
    plan = case.plan
    bare = Plan(
        q_len=plan.q_len,
        kv_len=plan.kv_len,
        q_sizes=plan.q_sizes,
        kv_sizes=plan.kv_sizes,
        blocks=plan.blocks,
        partial=True,
    )
    mask = bare.mask().expand(*plan.blocks.shape[:2], -1, -1).flatten(0, 1)
    mask = mask if side == "q" else mask.mT
    listed = triton_lists.build(plan, side, own=16, other=32)
    seen = torch.zeros(mask.shape[:2], dtype=torch.int64)
    for map_id, row, first, count in listed.tasks.tolist():
        assert 0 < count <= 16
        seen[map_id, first : first + count] += 1
        for token in range(first, first + count):
            assert tokens_listed(listed, row, mask.shape[2]) == mask[map_id, token].nonzero()[:, 0].tolist()
    assert (seen == 1).all()
    assert (listed.start.diff() * listed.unit % 32 == 0).all()


def dense_map(*shape: int) -> BlockMap:
    return BlockMap.from_dense(torch.ones(*shape, dtype=torch.bool))


def test_clusters_side_by_side_fill_one_tile():
    sizes = torch.tensor([5, 6, 0, 5, 16])
    plan = Plan(q_len=32, kv_len=32, q_sizes=32, kv_sizes=sizes, blocks=dense_map(1, 5))
    listed = triton_lists.build(plan, "q", own=64, other=32)
    assert [divmod(entry, 32) for entry in listed.entries.tolist()] == [(0, 16), (16, 16)]


def test_heavy_heads_come_first_and_in_them_heavy_rows():
    blocks = torch.zeros(2, 3, 4, dtype=torch.bool)
    blocks[0, 0, :1] = blocks[0, 1, :3] = blocks[0, 2, :2] = True
    blocks[1] = True
    listed = triton_lists.build(uniform_plan(blocks, 48, 64, 16), "q", own=16, other=16)
    assert listed.tasks[:, :2].tolist() == [[1, 3], [1, 4], [1, 5], [0, 1], [0, 2], [0, 0]]


def test_whole_blocks_are_listed_by_the_plan_itself():
    plan = uniform_plan(random_map(0, 2, 3), 200, 300, 128)
    listed = triton_lists.build(plan, "q", own=128, other=64)
    assert listed.entries is plan.blocks.columns
    assert listed.start is plan.blocks.start


def test_lists_are_made_once_for_a_plan_and_go_with_it():
    plan = uniform_plan(random_map(0, 2, 3), 200, 300, 100)
    assert triton_lists.lists(plan, "q", 64, 64) is triton_lists.lists(plan, "q", 64, 64)
    assert triton_lists.orders(plan) is triton_lists.orders(plan)
    before = len(triton_lists._lists), len(triton_lists._orders)
    del plan
    assert (len(triton_lists._lists), len(triton_lists._orders)) == (before[0] - 1, before[1] - 1)


def test_it_says_why_it_cannot_run_here(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("it can")
    q = qkv(0, 1, 1, 8, 8, 16, torch.float32)[0]
    with pytest.raises(UnsupportedError, match="there is no CUDA device"):
        run(dense_plan(8, 8), q, q, q, impl="triton")
    monkeypatch.setattr(triton, "find_spec", lambda name: None)
    assert "Triton is not installed" in dict(choose(dense_plan(8, 8), q).skipped)["triton"]


def test_what_a_compiler_makes_of_it_on_a_gpu_is_tried_first():
    assert kernel_named("triton").trial is triton.trial
    assert triton.trial().device == torch.device("cuda")


@pytest.mark.parametrize(
    ("q", "interpret", "why"),
    [
        (torch.zeros(1, 1, 8, 16), "0", "it runs on CUDA devices, the tensors are on cpu"),
        (torch.zeros(1, 1, 8, 16, device="meta"), "1", "it runs on CPUs, under TRITON_INTERPRET=1"),
        (torch.zeros(1, 1, 8, 16, dtype=torch.float64), "1", "float32 at most, the tensors are torch.float64"),
        (torch.zeros(1, 1, 8, 257), "1", "head dims up to 256, the tensors have 257"),
    ],
)
def test_calls_it_refuses(monkeypatch, q, interpret, why):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert why in str(triton.refuse(Needs(dense_plan(8, 8), q)))


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 6), 89), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100), ((12, 0), 120), ((13, 0), 120)],
)
def test_every_chip_finds_its_row(capability, arch):
    assert architecture(capability) == arch
    assert arch in HALF


@pytest.mark.parametrize(
    ("head_dim", "sizes", "mean", "own"),
    [
        (128, 128, 128, 128),
        (72, 256, 256, 128),
        (128, 64, 64, 64),
        (128, 96, 96, 64),
        (128, 1000, 1000, 128),
        (128, torch.ones(1), 600, 128),
        (128, torch.ones(1), 200, 64),
    ],
)
def test_tiles_suit_the_blocks(head_dim, sizes, mean, own):
    assert tile_for(90, "forward", head_dim, torch.bfloat16, sizes, mean).own == own
