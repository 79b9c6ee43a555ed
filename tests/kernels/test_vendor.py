"""The adapters to libraries that need a GPU, run on stand-ins that read their arguments as the libraries do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import qkv, random_map
from standins import STANDINS
from torch import Tensor

from falloff.kernels import UnsupportedError, attend, available, proof, run
from falloff.kernels.choose import kernel_named
from falloff.kernels.needs import Needs
from falloff.kernels.vendor import VENDOR, cudnn, flash4, flashinfer, probe, sparge
from falloff.kernels.vendor.lists import from_order, in_order, lists, refined
from falloff.plan import BlockMap, Plan

BATCH, HEADS, DIM = 2, 2, 64
every_standin = pytest.mark.parametrize("name", STANDINS)
Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """A stand-in in the place of a library, on a GPU of the given kind, whose tensors are on the CPU here."""

    def put(name: str, *, arch: int = 90, dense: bool = False) -> None:
        for key, module in STANDINS[name](dense=dense).items():
            monkeypatch.setitem(sys.modules, key, module)
        monkeypatch.setattr(probe, "arch", lambda device=None: arch)
        proof.verdict.cache_clear()
        probe.missing.cache_clear()

    yield put
    proof.verdict.cache_clear()
    probe.missing.cache_clear()


def plan_of(seed: int, q_len: int, kv_len: int, block: int = 128, maps: tuple[int, int] = (1, 1), **more: Any) -> Plan:
    shape = *maps, -(-q_len // block), -(-kv_len // block)
    blocks = random_map(seed, *shape, density=0.5)
    if not more.get("partial"):
        blocks[..., 0] = True
    sizes: dict[str, Any] = {"q_sizes": block, "kv_sizes": block}
    return Plan(q_len=q_len, kv_len=kv_len, blocks=BlockMap.from_dense(blocks), **(sizes | more))


def inputs(seed: int, plan: Plan, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    q, k, v = qkv(seed, BATCH, HEADS, plan.q_len, plan.kv_len, DIM, torch.float32)
    return [x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]


def order(seed: int, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).argsort(-1)


def agrees(name: str, plan: Plan, seed: int = 0, batch: int = BATCH, scale: float = 0.2) -> None:
    q, k, v = (x[:batch] for x in inputs(seed, plan))
    expected, expected_lse = run(plan, q, k, v, scale=scale, impl="reference")
    if name == "sparge":
        out = attend(plan, q, k, v, scale=scale, impl=name)
    else:
        out, lse = run(plan, q, k, v, scale=scale, impl=name)
        torch.testing.assert_close(lse, expected_lse, atol=1e-4, rtol=1e-4)
    assert out.dtype == q.dtype
    error = (out.float() - expected.float()).norm() / expected.float().norm()
    assert error < (0.1 if name == "sparge" else 0.005)


PLANS = {
    "whole blocks, one map": plan_of(1, 256, 384),
    "ragged": plan_of(2, 300, 420),
    "maps of each head": plan_of(3, 300, 384, maps=(1, HEADS)),
    "maps of each entry": plan_of(4, 256, 420, maps=(BATCH, 1)),
    "larger blocks": plan_of(5, 600, 900, 256, maps=(BATCH, HEADS)),
    "orders": plan_of(6, 300, 420, maps=(1, HEADS), q_order=order(1, 1, HEADS, 300), kv_order=order(2, 420)),
    "queries that see nothing": plan_of(7, 300, 420, maps=(BATCH, HEADS), partial=True),
}


@every_standin
@pytest.mark.parametrize("kind", PLANS)
def test_adapters_agree_with_the_reference(install: Install, name: str, kind: str) -> None:
    install(name)
    assert not PLANS["queries that see nothing"].blocks.start.diff().all()
    agrees(name, PLANS[kind])


@every_standin
def test_a_plan_serves_calls_of_other_batches_and_scales(install: Install, name: str) -> None:
    install(name)
    for batch, scale in ((2, 0.2), (1, 0.2), (2, 0.05)):
        agrees(name, PLANS["whole blocks, one map"], batch=batch, scale=scale)


def test_blocks_of_any_size_for_those_who_take_them(install: Install) -> None:
    install("flashinfer")
    q_sizes, kv_sizes = torch.tensor([[[100, 0, 30], [7, 60, 63]]]), torch.tensor([50, 0, 120, 30])
    blocks = BlockMap.from_dense(torch.ones(HEADS, 3, 4, dtype=torch.bool).tril(1))
    agrees("flashinfer", Plan(q_len=130, kv_len=200, q_sizes=q_sizes, kv_sizes=kv_sizes, blocks=blocks))
    agrees("flashinfer", plan_of(8, 50, 60, 20))


@pytest.mark.parametrize(("name", "block"), [("cudnn", 64), ("cudnn", 192), ("flash4", 384)])
def test_blocks_are_cut_into_tiles(install: Install, name: str, block: int) -> None:
    install(name)
    agrees(name, plan_of(9, 400, 500, block, maps=(1, HEADS)))


def test_tiles_differ_between_gpus(install: Install) -> None:
    install("sparge", arch=89)
    agrees("sparge", PLANS["ragged"])


def test_pairs_of_query_tiles_share_a_list_on_blackwell(install: Install) -> None:
    install("flash4", arch=100)
    agrees("flash4", plan_of(10, 700, 900, 256, maps=(1, HEADS)))
    with pytest.raises(UnsupportedError, match="multiples of 256 x 128, got 128 x 128"):
        agrees("flash4", PLANS["ragged"])


@pytest.mark.parametrize(("name", "through_lse"), [("cudnn", False), ("flash4", False), ("flash4", True)])
def test_gradients_agree_with_the_reference(install: Install, name: str, through_lse: bool) -> None:
    install(name)
    plan = replace(PLANS["orders"])
    tensors = [torch.cat([x, x], -1) / 2 for x in inputs(11, plan)]  # heads of 128 channels
    grads = []
    for impl in ("reference", name):
        leaves = [x.clone().requires_grad_() for x in tensors]
        if through_lse:
            out, lse = run(plan, *leaves, impl=impl)
            total = out.float().square().sum() + lse.sum()
        else:
            total = attend(plan, *leaves, impl=impl).float().square().sum()
        grads.append(torch.autograd.grad(total, leaves))
    for expected, got in zip(*grads, strict=True):
        assert (got.float() - expected.float()).norm() < 0.01 * expected.float().norm()


@every_standin
def test_one_that_ignores_its_lists_is_caught(install: Install, name: str) -> None:
    install(name, dense=True)
    plan = PLANS["ragged"]
    with pytest.raises(UnsupportedError, match=f"{name!r} cannot run this call: it gave one output for two"):
        attend(plan, *inputs(0, plan), impl=name)


@every_standin
def test_a_library_that_does_not_load_says_so(install: Install, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    install(name)
    for key in STANDINS[name]():
        monkeypatch.setitem(sys.modules, key, type(sys)(key))
    plan = PLANS["ragged"]
    with pytest.raises(UnsupportedError, match="its trial failed: ImportError: cannot import name"):
        attend(plan, *inputs(0, plan), impl=name)


def heads_of(dim: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    return [torch.zeros(BATCH, HEADS, n, dim, dtype=dtype) for n in (300, 420, 420)]


VARYING = plan_of(12, 300, 420, q_sizes=torch.tensor([128, 100, 72]))


@pytest.mark.parametrize(
    ("name", "arch", "plan", "tensors", "message"),
    [
        ("cudnn", 89, None, heads_of(64), "compute capability 9.0, 10.0, .* this one has 8.9"),
        ("cudnn", None, None, heads_of(64), "it runs on CUDA GPUs, the tensors are on cpu"),
        ("cudnn", 90, VARYING, heads_of(64), "of one size, the plan's vary"),
        ("cudnn", 90, plan_of(13, 300, 420, 32), heads_of(64), "multiples of 64 x 64, got 32 x 32"),
        ("cudnn", 90, None, heads_of(32), "does not compute heads of 32 channels"),
        ("cudnn", 90, None, heads_of(64, torch.float32), "does not compute in torch.float32"),
        ("cudnn", 100, plan_of(14, 300, 420, 64), heads_of(128, torch.float16), "not compute in torch.float16"),
        ("cudnn", 120, None, heads_of(64), "does not compute heads of 64 channels"),
        ("flash4", 120, None, heads_of(64), "9.0, 10.0, 10.3, 11.0, this one has 12.0"),
        ("flash4", 90, plan_of(15, 300, 420, 64), heads_of(64), "multiples of 128 x 128, got 64 x 64"),
        ("flash4", 90, None, heads_of(256), "does not compute heads of 256 channels"),
        ("flashinfer", 75, None, heads_of(64), "this one has 7.5"),
        ("flashinfer", 90, None, heads_of(96), "does not compute heads of 96 channels"),
        ("sparge", 120, None, heads_of(64), "this one has 12.0"),
        ("sparge", 90, plan_of(16, 300, 420, 64), heads_of(64), "multiples of 64 x 128, got 64 x 64"),
        ("sparge", 89, plan_of(16, 300, 420, 64), heads_of(64), "multiples of 128 x 64, got 64 x 64"),
        ("sparge", 90, None, heads_of(96), "does not compute heads of 96 channels"),
    ],
)
def test_calls_it_cannot_serve_are_refused(
    install: Install, name: str, arch: int, plan: Plan | None, tensors: list[Tensor], message: str
) -> None:
    install(name, arch=arch)
    for key in STANDINS[name]():
        sys.modules[key].__dict__.clear()  # nothing may be launched
    kernel = kernel_named(name)
    why = kernel.refuse(Needs(plan or PLANS["ragged"], tensors[0], lse=False))
    assert why is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(why)
    with pytest.raises(UnsupportedError):
        attend(plan or PLANS["ragged"], *tensors, impl=name)


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("cudnn", 90, "for gradients, it does not compute heads of 64 channels"),
        ("cudnn", 120, "no backward on this GPU"),
        ("flashinfer", 90, "no backward"),
        ("sparge", 90, "no backward"),
    ],
)
def test_gradients_it_does_not_have_are_refused(install: Install, name: str, arch: int, message: str) -> None:
    install(name, arch=arch)
    q, k, v = heads_of(128 if arch == 120 else 64)
    with pytest.raises(UnsupportedError, match=message):
        attend(PLANS["ragged"], q.requires_grad_(), k, v, impl=name)


def test_what_else_is_refused(install: Install) -> None:
    install("cudnn")
    q, k, v = heads_of(128)
    with pytest.raises(UnsupportedError, match="no gradient of the LSE"):
        run(PLANS["ragged"], q.requires_grad_(), k, v, impl="cudnn")
    with pytest.raises(UnsupportedError, match="cannot drop keys"):
        run(PLANS["ragged"], q, k, v, key_valid=torch.ones(BATCH, 420, dtype=torch.bool), impl="cudnn")
    install("sparge")
    short = plan_of(18, 100, 420)
    with pytest.raises(UnsupportedError, match="gives no LSE"):
        run(PLANS["ragged"], *heads_of(64), impl="sparge")
    with pytest.raises(UnsupportedError, match="at least 128 queries, got 100"):
        attend(short, *inputs(0, short), impl="sparge")


def test_why_they_cannot_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    probe.missing.cache_clear()
    foreign = [cudnn.KERNEL, flash4.KERNEL, flashinfer.KERNEL, sparge.KERNEL]
    monkeypatch.setattr(probe, "arch", lambda device=None: None)
    assert {kernel.absent() for kernel in foreign} == {"it runs on CUDA GPUs, none was found"}
    rows = {name: (can, why) for name, can, why in available()}
    assert all(rows[kernel.name] == (False, kernel.absent()) for kernel in foreign)
    monkeypatch.setattr(probe, "arch", lambda device=None: 90)
    monkeypatch.setattr(probe, "_found", lambda module: False)
    assert [kernel.absent() for kernel in foreign] == [
        "cudnn is not installed; pip install nvidia-cudnn-frontend",
        "flash_attn.cute is not installed; pip install --pre flash-attn-4",
        "flashinfer is not installed; pip install flashinfer-python",
        "spas_sage_attn is not installed; build it from github.com/thu-ml/SpargeAttn",
    ]
    probe.missing.cache_clear()


def test_modules_are_found_without_being_imported() -> None:
    assert probe.missing("no_such_module", "get it") == "no_such_module is not installed; get it"
    assert probe.missing("no_such_module.inner", "get it") == "no_such_module.inner is not installed; get it"
    assert probe.missing("torch.nn.attention", "") is None
    assert probe.missing("xml.sax", "") is None
    assert probe.missing("xml.no_such_part", "get it") is not None
    assert "no_such_module" not in sys.modules


def test_auto_takes_none_of_them() -> None:
    assert all(kernel.by_name is not None for kernel in VENDOR)
    assert {kernel.name for kernel in VENDOR} == {"flex", *STANDINS}


def test_lists_and_refinement_say_what_the_map_says() -> None:
    plan = PLANS["queries that see nothing"]
    dense = plan.blocks.dense()
    for width in (None, 6):
        found = lists(plan.blocks, width)
        assert found.counts.dtype == found.ids.dtype == torch.int32
        assert found.ids.shape[3] == (int(dense.sum(-1).max()) if width is None else width)
        for index in torch.cartesian_prod(*map(torch.arange, dense.shape[:3])).tolist():
            row = found.ids[(*index, slice(0, int(found.counts[tuple(index)])))]
            assert row.tolist() == dense[tuple(index)].nonzero()[:, 0].tolist()
    fine = refined(plan, 64, 32)
    cut = replace(plan, q_sizes=64, kv_sizes=32, blocks=fine)
    assert torch.equal(cut.mask(), plan.mask())
    assert refined(plan, 128, 128) is plan.blocks


@pytest.mark.parametrize("shape", [(7,), (1, 1, 7), (1, 3, 7), (2, 1, 7), (2, 3, 7)])
def test_tokens_go_into_an_order_and_back(shape: tuple[int, ...]) -> None:
    x = torch.arange(2 * 3 * 7 * 2).view(2, 3, 7, 2)
    turn = order(3, *shape)
    moved = in_order(x, turn)
    expected = x.gather(2, turn.expand(2, 3, 7)[..., None].expand_as(x))
    assert torch.equal(moved, expected)
    assert torch.equal(from_order(moved, turn), x)
