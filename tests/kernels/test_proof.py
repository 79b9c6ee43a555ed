"""A foreign kernel is believed only when its trial agrees with the reference."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import AUTO, random_map, uniform_plan

from falloff.kernels import UnsupportedError, attend, available, choose, proof, reference, run
from falloff.kernels.choose import OWN
from falloff.kernels.kernel import Attention, Kernel
from falloff.kernels.needs import Needs
from falloff.kernels.trial import Trial
from falloff.plan import BlockMap, Plan, dense_plan

CPU = torch.device("cpu")
TRIAL = Trial(CPU, torch.float32, 16, 8, 8)


def foreign(attention: Attention = reference.attention, **more: Any) -> Kernel:
    return Kernel("foreign", "tests", attention, lambda: None, lambda needs: None, trial=lambda: TRIAL, **more)


@pytest.mark.parametrize(
    "trial",
    [
        TRIAL,
        TRIAL._replace(ragged=(False, True), own_maps=(True, False)),
        TRIAL._replace(own_maps=(False, False), partial=True, grad=True),
        TRIAL._replace(q_block=None, kv_block=None, own_maps=(True, True), lse=False, grad=True),
        TRIAL._replace(dtype=torch.float16, q_block=None),
    ],
)
def test_the_reference_passes_every_trial(trial: Trial) -> None:
    assert proof.verdict(foreign(), trial) is None


def dense(plan: Plan, q: Any, k: Any, v: Any, scale: float, key_valid: Any) -> Any:
    return reference.attention(dense_plan(plan.q_len, plan.kv_len), q, k, v, scale, key_valid)


def without_tail(plan: Plan, q: Any, k: Any, v: Any, scale: float, key_valid: Any) -> Any:
    blocks = plan.blocks.dense()
    blocks[..., -1] = False
    return reference.attention(replace(plan, blocks=BlockMap.from_dense(blocks), partial=True), q, k, v, scale, None)


def mixed_heads(plan: Plan, q: Any, k: Any, v: Any, scale: float, key_valid: Any) -> Any:
    blocks = BlockMap.from_dense(plan.blocks.dense().flip(1))
    return reference.attention(replace(plan, blocks=blocks), q, k, v, scale, key_valid)


def other_base(*call: Any) -> Any:
    out, lse = reference.attention(*call)
    return out, lse / math.log(2)


def widened(*call: Any) -> Any:
    out, lse = reference.attention(*call)
    return out.double(), lse


def no_gradient_of_k(plan: Plan, q: Any, k: Any, *rest: Any) -> Any:
    return reference.attention(plan, q, k.detach() + 0 * k, *rest)


def broken(*call: Any) -> Any:
    raise ImportError("libfoo.so.7: cannot open\nand much more")


def announced(*call: Any) -> Any:
    raise RuntimeError("backend='inductor' raised:\nValueError: no such tile\n\nand much more")


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (dense, "one output for two different maps"),
        (without_tail, "its output is off by"),
        (mixed_heads, "its output is off by"),
        (other_base, "its LSE is off by"),
        (widened, r"its output is torch.float64 \(1, 2, 20, 16\), expected torch.float32"),
        (no_gradient_of_k, "its gradient of k is off by 1, at most 0.01"),
        (broken, "its trial failed: ImportError: libfoo.so.7: cannot open$"),
        (announced, "its trial failed: RuntimeError: backend='inductor' raised: ValueError: no such tile$"),
    ],
)
def test_a_kernel_that_does_something_else_is_caught(attention: Attention, why: str) -> None:
    verdict = proof.verdict(foreign(attention), TRIAL._replace(grad=True))
    assert verdict is not None
    with pytest.raises(AssertionError, match=why):
        raise AssertionError(verdict)


def test_a_kernel_of_lower_precision_has_its_own_tolerance() -> None:
    def rough(*call: Any) -> Any:
        out, lse = reference.attention(*call)
        return out * 1.05, lse

    assert "off by 0.05" in str(proof.verdict(foreign(rough), TRIAL))
    assert proof.verdict(foreign(rough, tolerance=0.1), TRIAL) is None


def test_a_trial_is_run_once_in_a_process_for_every_kind_of_call() -> None:
    seen = []

    def counting(plan: Plan, q: Any, *rest: Any) -> Any:
        seen.append((q.dtype, q.shape[3]))
        return reference.attention(plan, q, *rest)

    kernel = foreign(counting)
    plan = uniform_plan(random_map(0, 3, 3) | torch.eye(3, dtype=torch.bool), 24, 24, 8, partial=False)
    for dtype in (torch.float32, torch.float32, torch.float16):
        assert proof.fault(kernel, Needs(plan, torch.zeros(1, 1, 24, 4, dtype=dtype))) is None
    assert seen == [(torch.float32, 4)] * 2 + [(torch.float16, 4)] * 2


def test_a_trial_is_like_the_call() -> None:
    blocks = BlockMap.from_dense(random_map(1, 2, 1, 3, 4))
    sizes = torch.tensor([5, 0, 9, 2])
    plan = Plan(q_len=20, kv_len=16, q_sizes=8, kv_sizes=sizes, blocks=blocks, partial=True)
    needs = Needs(plan, torch.zeros(2, 3, 20, 24, dtype=torch.float16), grad=True, lse=False)
    expected = Trial(CPU, torch.float16, 24, 8, None, (True, False), (True, False), partial=True, lse=False, grad=True)
    assert Trial.like(needs) == expected
    first, second = expected.plans()
    assert (first.q_len, first.kv_len, first.partial) == (20, 129, True)
    assert first.blocks.shape == (2, 1, 3, 4)
    assert not (first.blocks.dense() & second.blocks.dense()).any()
    assert expected.tensors(first)[0].shape == (2, 2, 20, 24)


def test_inference_mode_and_autocast_do_not_reach_a_trial() -> None:
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert proof.verdict(foreign(reference.attention), TRIAL._replace(grad=True, head_dim=17)) is None


def registered(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    registry = sys.modules["falloff.kernels.choose"]  # of the package, that name is the function
    monkeypatch.setattr(registry, "KERNELS", (*OWN, kernel))


def test_a_kernel_by_name_only_is_not_even_looked_at_by_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    def never() -> str | None:
        raise AssertionError("probed")

    registered(monkeypatch, foreign(by_name="not measured")._replace(absent=never))
    choice = choose(dense_plan(8, 8), torch.zeros(1, 1, 8, 4))
    assert ("foreign", "not measured") in choice.skipped


def test_a_named_kernel_runs_after_its_trial_and_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 1, 8, 4, generator=torch.Generator().manual_seed(0))
    registered(monkeypatch, foreign(by_name="not measured"))
    plan = dense_plan(8, 8)
    assert torch.equal(attend(plan, q, q, q, impl="foreign"), run(plan, q, q, q, impl="reference")[0])
    registered(monkeypatch, foreign(dense))
    with pytest.raises(UnsupportedError, match="'foreign' cannot run this call: it gave one output"):
        run(plan, q, q, q, impl="foreign")
    assert choose(plan, q).name == AUTO
    assert available()[-1] == ("foreign", True, "tests")
    assert available(prove=True)[-1][1:] == (False, "it gave one output for two different maps: it does not read them")
