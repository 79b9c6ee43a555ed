"""Sparse attention kernels against dense attention on one shape and map.

Speed-up is over the fastest dense arm: those of ``dense.peers``, and our own kernels with every block on, so that a
gain which is not sparsity's is not credited to it. Efficiency is speed-up times density, 1 being ideal.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, NamedTuple

import torch

from falloff import kernels
from falloff.evaluation.bench import exact, expect, maps
from falloff.evaluation.bench.arms import Arms, Inputs, dense_arms, on_plan, sparse_arms
from falloff.evaluation.bench.dense import Attend
from falloff.evaluation.bench.memory import require
from falloff.evaluation.bench.shapes import Shape
from falloff.evaluation.bench.timing import Arm, BenchmarkError, Times, interleaved, once, tried
from falloff.evaluation.machine import PeakMemory
from falloff.plan import Plan, dense_plan

UNNAMED = "the specification, not made for speed; name it to measure it"
FLOPS = {False: 1.0, True: 3.5}
"""Products of a call over those of its forward alone: the backward multiplies five times, the forward twice."""
TENSORS = {False: 8, True: 18}
"""Tensors of the size of q held at once: inputs, outputs, gradients, and copies in another order or precision."""
STEPS_BESIDES = 2
"""Calls of ``progress`` besides one a round: before the warm-up and after it."""
PLANNING_REPEATS = 3

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Work:
    """One row to measure. ``block``: ``None`` for the map's own. ``backward``: gradients as well."""

    shape: Shape
    map: str = "radial"
    block: int | None = None
    dtype: str = "float32"
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.shape.name}, {self.map}, {self.dtype}" + (", with backward" if self.backward else "")


@dataclass(frozen=True, kw_only=True)
class ArmResult:
    """What one arm took, medians over rounds, forward and backward together unless named.

    tflops: over the pairs that it computes. speedup: over the fastest dense arm.
    efficiency, launch_ms (deriving what the kernel needs from a new plan; ``None`` also where that is too short to
    tell): of sparse arms only.
    extra_bytes: peak memory of one call beyond its inputs; ``None`` where unknown.
    relative_error, gradient_error (of q): L2, over sampled queries, against float32.
    """

    kind: str
    ms: float
    ms_best: float
    ms_worst: float
    forward_ms: float
    backward_ms: float | None
    tflops: float
    speedup: float
    efficiency: float | None
    launch_ms: float | None
    extra_bytes: int | None
    relative_error: float
    gradient_error: float | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """All arms of one work, dense ones first; ``refused``: those that cannot run, and why.

    plan_ms: making the plan once, ``None`` for a random map, which nobody would make at run time.
    """

    shape: str
    heads: int
    head_dim: int
    tokens: int
    grid: str
    map: str
    block: int
    dtype: str
    backward: bool
    density: float
    plan_ms: float | None
    best_dense: str
    arms: dict[str, ArmResult]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class _Side(NamedTuple):
    """What the dense arms, or the sparse ones, have in common."""

    kind: str
    plan: Plan
    sample: exact.Sample


def measure(
    work: Work,
    *,
    device: torch.device,
    kernel_names: Sequence[str] = (),
    rounds: int = 7,
    progress: Progress = lambda doing: None,
) -> Row:
    """Measure every dense peer, and the named kernels: all but the reference unless named.

    ``progress`` is called before the warm-up, after it, and after each round: ``rounds + STEPS_BESIDES`` times. Raises
    ``ValueError`` for a map that the shape cannot have, ``BenchmarkError`` where memory would not suffice, where no
    dense attention can run, and when the number of threads changes.
    """
    shape, dtype = work.shape, getattr(torch, work.dtype)
    require(TENSORS[work.backward] * shape.heads * shape.tokens * shape.head_dim * dtype.itemsize, device, str(work))
    plan, plan_ms = _planned(work, device)
    inputs = Inputs.random(
        shape.heads, shape.tokens, shape.head_dim, dtype=dtype, device=device, backward=work.backward
    )
    with torch.set_grad_enabled(work.backward):
        sparse, skipped = _sparse(plan, inputs, kernel_names)
        dense, absent = dense_arms(inputs, sparse)
        progress(f"{work}{_expected(work, len(dense) + plan.density * len(sparse), rounds, device)}")
        able, failed = tried(dense | sparse, device)
        progress(str(work))
        if not dense.keys() & able.keys():
            raise BenchmarkError(f"{work}: no dense attention can run, so there is nothing to compare with: {failed}")
        times = interleaved(
            able, rounds=rounds, device=device, threads=torch.get_num_threads(), on_round=lambda: progress(str(work))
        )
        results = _results(able, times, dense.keys() & able.keys(), plan, inputs)
    return Row(
        shape=shape.name,
        heads=shape.heads,
        head_dim=shape.head_dim,
        tokens=shape.tokens,
        grid=shape.grid,
        map=work.map,
        block=int(plan.q_sizes),
        dtype=work.dtype,
        backward=work.backward,
        density=plan.density,
        plan_ms=plan_ms,
        best_dense=_fastest(times, dense.keys() & able.keys()),
        arms=results,
        refused=absent | skipped | failed,
    )


def check_kernels(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a kernel that does not exist."""
    known = [name for name, _, _ in kernels.available()]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown kernel {name!r}; choose one of {', '.join(known)}")


def _planned(work: Work, device: torch.device) -> tuple[Plan, float | None]:
    """The plan, and milliseconds of making it."""
    if maps.is_random(work.map):
        return maps.plan_of(work.map, work.shape, work.block).to(device), None
    seconds = []
    for _ in range(PLANNING_REPEATS):
        start = time.perf_counter()
        plan = maps.plan_of(work.map, work.shape, work.block).to(device)
        seconds.append(time.perf_counter() - start)
    return plan, 1e3 * median(seconds)


def _sparse(plan: Plan, inputs: Inputs, names: Sequence[str]) -> Arms:
    if names:
        return sparse_arms(plan, inputs, names)
    fast = [name for name, _, _ in kernels.available() if name != "reference"]
    able, refused = sparse_arms(plan, inputs, fast)
    return Arms(able, {**refused, "reference": UNNAMED})


def _expected(work: Work, dense_calls: float, rounds: int, device: torch.device) -> str:
    """How long so many dense calls a round will take, in words."""
    shape = work.shape
    flops = 4 * shape.heads * shape.tokens**2 * shape.head_dim * FLOPS[work.backward] * dense_calls * (rounds + 2)
    dtype = getattr(torch, work.dtype)
    return expect.in_words(flops, heads=shape.heads, head_dim=shape.head_dim, dtype=dtype, device=device)


def _fastest(times: dict[str, Times], names: set[str]) -> str:
    return min(names, key=lambda name: times[name].median)


def _results(
    arms: dict[str, Arm], times: dict[str, Times], peers: set[str], plan: Plan, inputs: Inputs
) -> dict[str, ArmResult]:
    best = times[_fastest(times, peers)].median
    everything = dense_plan(plan.q_len, plan.kv_len).to(inputs.q.device)
    dense = _Side("dense", everything, exact.sample(everything, *inputs))
    sparse = _Side("sparse", plan, exact.sample(plan, *inputs))
    return {
        name: _result(name, arms[name], times[name], best, dense if name in peers else sparse, inputs) for name in arms
    }


def _result(name: str, arm: Arm, times: Times, best: float, side: _Side, inputs: Inputs) -> ArmResult:
    _, heads, _, head_dim = inputs.q.shape
    flops = side.plan.flops(batch=1, heads=heads, head_dim=head_dim) * FLOPS[arm.backward is not None]
    sparse = side.kind == "sparse"
    memory = PeakMemory(inputs.q.device)
    out = arm.forward()
    d_q = arm.backward(out)[0] if arm.backward is not None else None
    return ArmResult(
        kind=side.kind,
        ms=1e3 * times.median,
        ms_best=1e3 * min(times.total),
        ms_worst=1e3 * max(times.total),
        forward_ms=1e3 * median(times.forward),
        backward_ms=1e3 * median(times.backward) if times.backward else None,
        tflops=1e-12 * flops / times.median,
        speedup=best / times.median,
        efficiency=best / times.median * side.plan.density if sparse else None,
        launch_ms=_launch_ms(name, side.plan, inputs) if sparse else None,
        extra_bytes=memory.beyond(),
        relative_error=side.sample.error(out),
        gradient_error=None if d_q is None else side.sample.gradient_error(d_q),
    )


def _launch_ms(name: str, plan: Plan, inputs: Inputs) -> float | None:
    """What the first forward on a new plan takes beyond one on a known plan, each at its best."""
    seconds = []
    for _ in range(PLANNING_REPEATS):
        new = dataclasses.replace(plan, blocks=dataclasses.replace(plan.blocks))
        call = _forward(on_plan(new, name), inputs)
        seconds.append([*once(call, inputs.q.device), *once(call, inputs.q.device)])
    first, again = (min(column) for column in zip(*seconds, strict=True))
    return 1e3 * (first - again) if first > again else None


def _forward(attend: Attend, inputs: Inputs) -> Arm:
    """Attention without gradients."""
    q, k, v = (x.detach() for x in (inputs.q, inputs.k, inputs.v))
    return Arm(lambda: attend(q, k, v))
