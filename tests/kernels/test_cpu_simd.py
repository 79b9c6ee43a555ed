"""The C++ kernel: what holds for every kernel at each width of vectors, its own paths, and no compiler."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernel_cases import qkv, random_map, uniform_plan
from torch.utils.checkpoint import checkpoint

from falloff.kernels import UnsupportedError, available, choose, compiled, cpu_simd, proof, run
from falloff.plan import BlockMap, Plan, dense_plan

HERE = Path(__file__).parent
WIDTH = {"AVX512": 16, "AVX2": 8}.get(torch.backends.cpu.get_cpu_capability()[:6], 4)
pytestmark = pytest.mark.skipif(cpu_simd.absent() is not None, reason=str(cpu_simd.absent()))


@pytest.fixture
def fresh() -> Iterator[None]:
    """What was found out about libraries is forgotten, before and after."""
    compiled.library.cache_clear()
    yield
    compiled.library.cache_clear()


@pytest.mark.parametrize(("capability", "width"), [("avx512", 16), ("avx2", 8), ("default", 4)])
def test_what_holds_for_every_kernel_holds_at_every_width(capability: str, width: int) -> None:
    if width > WIDTH:
        pytest.skip(f"this CPU has no {capability.upper()}")
    env = os.environ | {"FALLOFF_TEST_KERNEL": "cpu-simd", "ATEN_CPU_CAPABILITY": capability}
    probe = "from falloff.kernels import compiled, cpu_simd; print(compiled.library(cpu_simd.SOURCE).falloff_width())"
    said = subprocess.run([sys.executable, "-c", probe], env=env, capture_output=True, text=True, check=True).stdout
    assert int(said) == width
    files = [str(HERE / name) for name in ("test_run.py", "test_summary.py", "test_skip.py", "test_look.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=env, cwd=HERE.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.mark.parametrize("dim", [20, 64, 130])
@pytest.mark.parametrize("sizes", [(128, 128), (64, 100), (300, 30)])
def test_tiles_strips_and_tails_meet_the_reference_in_float64(dim: int, sizes: tuple[int, int]) -> None:
    plan = Plan(
        q_len=431,
        kv_len=389,
        q_sizes=sizes[0],
        kv_sizes=sizes[1],
        blocks=BlockMap.from_dense(random_map(0, 2, -(-431 // sizes[0]), -(-389 // sizes[1]), density=0.7)),
        partial=True,
    )
    exact = [x.requires_grad_() for x in qkv(1, 2, 2, 431, 389, dim)]
    answers = []
    for impl, leaves in (("reference", exact), ("cpu-simd", [x.detach().float().requires_grad_() for x in exact])):
        out, lse = run(plan, *leaves, impl=impl)
        total = (out.sin().sum() + torch.where(lse.isinf(), 0, lse).cos().sum()).double()
        answers.append([x.double() for x in (out, lse, *torch.autograd.grad(total, leaves))])
    for expected, got in zip(*answers, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    plan = uniform_plan(random_map(4, 2, 9, 9) | torch.eye(9, dtype=torch.bool), 550, 550, 64)
    leaves = [x.requires_grad_() for x in qkv(5, 2, 2, 550, 550, 32, torch.float32)]
    before, answers = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert cpu_simd._threads(plan, 2, 2, 32) == threads
            out, lse = run(plan, *leaves, impl="cpu-simd")
            answers.append([out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*answers, strict=True))


def test_threads_of_its_own_compute_the_same(fresh: None) -> None:
    plan = uniform_plan(torch.ones(9, 9, dtype=torch.bool), 550, 550, 64)
    q, k, v = qkv(5, 2, 2, 550, 550, 32, torch.float32)
    expected = run(plan, q, k, v, impl="cpu-simd")
    made = compiled.library(cpu_simd.SOURCE)
    assert not isinstance(made, compiled.CompileError)
    made.falloff_use(None)
    try:
        assert all(torch.equal(a, b) for a, b in zip(run(plan, q, k, v, impl="cpu-simd"), expected, strict=True))
    finally:
        compiled.library.cache_clear()
        compiled.library(cpu_simd.SOURCE)


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(name: str, poison: float) -> None:
    tensors = dict(zip("qkv", qkv(6, 1, 1, 70, 70, 16, torch.float32), strict=True))
    tensors[name][0, 0, 5] = poison
    out, _ = run(dense_plan(70, 70, 32), *tensors.values(), impl="cpu-simd")
    expected, _ = run(dense_plan(70, 70, 32), *tensors.values(), impl="reference")
    assert torch.equal(out.isfinite(), expected.isfinite())
    assert not out.isfinite().all()


def test_auto_takes_it_and_falls_to_the_next_without_a_compiler(
    monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path
) -> None:
    q = torch.zeros(1, 1, 8, 4)
    assert choose(dense_plan(8, 8), q).name == "cpu-simd"
    assert choose(dense_plan(8, 8), q.double()).name == "cpu"
    compiled.library.cache_clear()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    choice = choose(dense_plan(8, 8), q)
    assert choice.name == "cpu"
    assert "no C++ compiler" in dict(choice.skipped)["cpu-simd"]
    assert ("cpu-simd", False) in [row[:2] for row in available()]
    with pytest.raises(UnsupportedError, match="install one or set CXX"):
        run(dense_plan(8, 8), q, q, q, impl="cpu-simd")


def test_a_compiler_that_fails_is_a_reason_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "x.cpp:1: error: no such luck" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert cpu_simd.absent() == "broken failed: x.cpp:1: error: no such luck"
    assert list((tmp_path / "cache" / "falloff").iterdir()) == []


def test_it_is_compiled_once(monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cpu_simd.absent() is None
    (made,) = (tmp_path / "falloff").iterdir()
    before = made.stat().st_mtime_ns
    compiled.library.cache_clear()
    assert cpu_simd.absent() is None
    assert [made.stat().st_mtime_ns] == [before]


def test_without_a_home_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, fresh: None) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: exec('raise RuntimeError("no home directory")'))
    assert "no home directory; XDG_CACHE_HOME names another cache" in str(cpu_simd.absent())


def test_a_cache_that_cannot_be_written_is_a_reason(
    monkeypatch: pytest.MonkeyPatch, fresh: None, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "XDG_CACHE_HOME names another cache" in str(cpu_simd.absent())


def test_a_block_of_queries_that_no_tile_holds_is_not_left_out() -> None:
    q = torch.zeros(1, 1, 300, 4)
    plan = dataclasses.replace(dense_plan(300, 300, 150), skip=5.0)
    with pytest.raises(UnsupportedError, match="query blocks of one size of at most 128 tokens"):
        run(plan, q, q, q, impl="cpu-simd")
    assert choose(plan, q).name == "cpu"


def test_auto_passes_over_it_where_blocks_of_keys_are_small() -> None:
    q = torch.zeros(1, 1, 96, 4)
    single = Plan(
        q_len=96,
        kv_len=96,
        q_sizes=32,
        kv_sizes=torch.tensor([1, 1, 1, 93]),
        blocks=BlockMap.from_dense(torch.ones(3, 4, dtype=torch.bool)),
    )
    alone = dataclasses.replace(
        single, kv_sizes=torch.ones(96, dtype=torch.int64), blocks=BlockMap.from_dense(torch.ones(3, 96).bool())
    )
    assert choose(single, q).name == "cpu-simd"
    choice = choose(alone, q)
    assert choice.name == "cpu"
    assert "its panels would be" in dict(choice.skipped)["cpu-simd"]
    assert choose(alone, q, impl="cpu-simd").name == "cpu-simd"


def test_a_first_call_under_gradient_checkpointing_saves_what_the_second_does() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(7, 1, 2, 96, 96, 24, torch.float32))
    plan = uniform_plan(torch.eye(3, dtype=torch.bool), 96, 96, 32)
    proof.verdict.cache_clear()
    out = checkpoint(lambda: run(plan, q, k, v, impl="cpu-simd")[0], use_reentrant=False)
    expected = torch.autograd.grad(run(plan, q, k, v, impl="cpu-simd")[0].sum(), (q, k, v))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), (q, k, v)), expected, strict=True))
