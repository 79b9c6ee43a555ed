"""The door, the choice, and what is kept with a plan."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from kernel_cases import AUTO, qkv, random_map, uniform_plan

from falloff.kernels import KernelError, UnsupportedError, available, choose, cpu_tile, launch, run
from falloff.plan import dense_plan


def test_auto_says_what_it_picked_and_why_not_the_others():
    q = qkv(0, 1, 1, 8, 8, 4, torch.float32)[0]
    choice = choose(dense_plan(8, 8), q)
    assert choice.name == AUTO
    assert dict(choice.skipped).keys() == {name for name, _, _ in available()} - {AUTO}
    assert all(f"not {name}: {why}" in str(choice) for name, why in choice.skipped)
    assert str(choice).startswith(f"{AUTO}: ")


@pytest.mark.parametrize(
    ("dtype", "needs_grad", "needs_lse", "name"),
    [
        (torch.bfloat16, False, False, "cpu-tile"),
        (torch.bfloat16, False, True, AUTO),
        (torch.bfloat16, True, False, AUTO),
        (torch.float32, False, False, AUTO),
    ],
)
def test_auto_takes_the_tile_kernel_only_where_it_is_fast_and_exact_enough(
    monkeypatch, dtype, needs_grad, needs_lse, name
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    q = torch.zeros(1, 1, 8, 4, dtype=dtype)
    assert choose(dense_plan(8, 8), q, needs_grad=needs_grad, needs_lse=needs_lse).name == name


def test_auto_passes_over_the_tile_kernel_where_amx_serves_the_flash_operator_better(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    q = torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16)
    choice = choose(dense_plan(8, 8), q, needs_lse=False)
    assert choice.name != "cpu-tile"
    assert "the CPU has AMX" in dict(choice.skipped)["cpu-tile"]


def test_a_named_kernel_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    q = torch.zeros(1, 1, 8, 4, dtype=torch.bfloat16)
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda: False, raising=False)
    with pytest.raises(UnsupportedError, match="neither AVX-512 BF16 nor AMX"):
        run(dense_plan(8, 8), q, q, q, impl="cpu-tile")
    assert ("cpu-tile", False) in [row[:2] for row in available()]
    with pytest.raises(UnsupportedError, match="unknown kernel 'fast'"):
        run(dense_plan(8, 8), q, q, q, impl="fast")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    with pytest.raises(UnsupportedError, match="float32"):
        run(dense_plan(8, 8), *(q.float(),) * 3, impl="cpu-tile")
    with pytest.raises(UnsupportedError, match="no backward"):
        run(dense_plan(8, 8), q.requires_grad_(), q, q, impl="cpu-tile")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(8, 4)}, r"q must be \[batch, heads, 8, head_dim\], got \(8, 4\)"),
        ({"q": torch.zeros(1, 2, 9, 4)}, r"q must have shape \(1, 2, 8, 4\), got \(1, 2, 9, 4\)"),
        ({"k": torch.zeros(1, 2, 9, 4)}, r"k must have shape \(1, 2, 8, 4\), got \(1, 2, 9, 4\)"),
        ({"v": torch.zeros(1, 2, 8, 5)}, "v must have shape"),
        ({"v": torch.zeros(1, 2, 8, 4).half()}, "one floating dtype"),
        ({name: torch.zeros(1, 2, 8, 4, dtype=torch.int64) for name in "qkv"}, "one floating dtype"),
        ({"k": torch.zeros(1, 2, 8, 4, device="meta")}, "k is on meta, the plan on cpu"),
        ({name: torch.zeros(1, 3, 8, 4) for name in "qkv"}, "maps are for heads 2, q has heads 3"),
        ({name: torch.zeros(0, 2, 8, 4) for name in "qkv"}, "at least one batch entry"),
        ({"key_valid": torch.ones(8, dtype=torch.bool)}, r"key_valid must be bool \(1, 8\)"),
        ({"key_valid": torch.ones(1, 8)}, "key_valid must be bool"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_at_the_door(change, message):
    plan = uniform_plan(torch.ones(2, 2, 2, dtype=torch.bool), 8, 8, 4)
    call = {name: torch.zeros(1, 2, 8, 4) for name in "qkv"} | change
    with pytest.raises(KernelError, match=message):
        run(plan, call["q"], call["k"], call["v"], key_valid=call.get("key_valid"))


def test_launch_lists_are_made_once_for_a_plan_and_go_with_it(monkeypatch):
    built = []
    build = launch.build
    monkeypatch.setattr(launch, "build", lambda *given: built.append(given[1:3]) or build(*given))
    q, k, v = qkv(1, 2, 2, 32, 32, 8)
    plan = uniform_plan(random_map(1, 4, 4), 32, 32, 8)
    for _ in range(3):
        run(plan, q, k, v, impl="cpu")
    assert built == [(2, 2)]
    run(plan, q[:1], k[:1], v[:1], impl="cpu")
    assert built == [(2, 2), (1, 2)]
    alive = weakref.ref(plan)
    built.clear()
    del plan
    gc.collect()
    assert alive() is None


def test_query_blocks_with_one_key_list_are_joined():
    blocks = random_map(2, 1, 8).expand(8, 8)
    (chunk,) = launch.build(uniform_plan(blocks, 64, 64, 8), 1, 3).chunks
    assert chunk.q_units.shape == (3, 8)
    assert chunk.q_units.flatten().tolist() == list(range(24))


def test_the_tile_kernel_is_close_to_the_reference():
    exact = qkv(3, 1, 2, 200, 200, 64, torch.float32)
    low = [x.bfloat16() for x in exact]
    low[0] = low[0] * 4  # logits of standard deviation 4, where scores near zero matter
    plan = uniform_plan(random_map(3, 2, 7, 7) | torch.eye(7, dtype=torch.bool), 200, 200, 32)
    expected = run(plan, *(x.float() for x in low), impl="reference")
    out, lse = cpu_tile.attention(plan, *low, 64**-0.5, None)
    error = (out.float() - expected[0]).norm() / expected[0].norm()
    assert error < 0.008
    assert (lse - expected[1]).abs().max() < 0.15


def test_the_tile_kernel_drops_keys_and_leaves_empty_rows_alone():
    q, k, v = (x.bfloat16() for x in qkv(4, 1, 1, 16, 16, 8, torch.float32))
    plan = uniform_plan(torch.tensor([[True, True], [False, True]]), 16, 16, 8)
    valid = torch.arange(16)[None] < 8
    k[:, :, 8:] = torch.nan
    out, lse = cpu_tile.attention(plan, q, k, v, 1.0, valid)
    assert out[:, :, :8].isfinite().all()
    assert not out[:, :, 8:].any()
    assert (lse[:, :, 8:] == -torch.inf).all()
