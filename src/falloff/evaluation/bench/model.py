"""The time of one denoising step of a whole transformer: dense against a method on every layer.

Static maps cost the same whatever the weights, so that weights are random. Beside the measured speed-up stands what
can be expected at most, by Amdahl's law, from attention's share of the operations and of the measured dense time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from falloff.evaluation.bench import expect, maps, models
from falloff.evaluation.bench.memory import require
from falloff.evaluation.bench.timing import BenchmarkError, Times, interleaved, tried
from falloff.evaluation.bench.ways import Observed, Runner, Way, ways_of
from falloff.evaluation.comparison import attention_ceiling

STEPS_BESIDES = 3
"""Calls of ``progress`` besides one a round: before the weights are made, before the warm-up and after it."""


@dataclass(frozen=True, kw_only=True)
class ModelArm:
    """One way to compute attention; medians over rounds.

    attention_ms: inside self-attention, of one forward. speedup: over the fastest dense arm. peak_bytes: of one
    forward, weights included; ``None`` where unknown. kernels: self-attention calls by kernel.
    """

    kind: str
    ms: float
    ms_best: float
    ms_worst: float
    speedup: float
    attention_ms: float
    peak_bytes: int | None
    kernels: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class Bound:
    """What sparse attention can gain: attention's share of a dense forward, 0 to 1, and the speed-up that leaves, at
    the map's density and without any attention."""

    share: float
    at_density: float
    without_attention: float

    @staticmethod
    def of(share: float, density: float) -> Bound:
        return Bound(
            share=share,
            at_density=attention_ceiling(share, density),
            without_attention=attention_ceiling(share),
        )


@dataclass(frozen=True, kw_only=True)
class ModelRow:
    """All arms of one transformer, dense ones first; ``refused``: those that cannot run, and why.

    by_operations: the bound were all operations equally fast; by_time: from the time measured on the fastest dense
    arm.
    """

    shape: str
    model: str
    config: dict[str, Any]
    parameters: int
    layers: int
    tokens: int
    grid: str
    dtype: str
    map: str
    settings: dict[str, Any]
    density: float
    by_operations: Bound
    by_time: Bound
    best_dense: str
    arms: dict[str, ModelArm]
    refused: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def measure(
    model: models.TrueModel,
    *,
    map_name: str = "radial",
    dtype: torch.dtype,
    device: torch.device,
    kernel_names: Sequence[str] = ("auto",),
    rounds: int = 5,
    progress: Callable[[str], None] = lambda doing: None,
) -> ModelRow:
    """Measure a transformer dense, by every peer, and sparse on every layer, by each of the kernels named.

    ``progress`` is called ``rounds + STEPS_BESIDES`` times. Raises ``ValueError`` for a map that the shape cannot
    have, ``UnsupportedModelError`` for a family without a host, ``BenchmarkError`` where memory would not suffice,
    where the dense model cannot run, and when the number of threads changes.
    """
    name, shape = f"{model.shape.name}, {map_name}", model.shape
    method = maps.method_of(map_name, shape)
    plan = maps.plan_of(map_name, shape).to(device)
    require(models.bytes_needed(model, dtype), device, f"{shape.name} in {_name(dtype)}")
    progress(f"{name}: making the weights")
    made = models.build(model, dtype, device)
    runner = Runner(made, models.inputs(model, made, dtype, device))
    parameters = sum(parameter.numel() for parameter in made.parameters())
    attention, rest = operations(model, runner.layers, parameters)
    assert shape.sequence is not None
    queries = _queries(model, dtype, device)
    ways, refused = ways_of(method, plan, queries, kernel_names, masked=shape.sequence.text > 0)
    expected = expect.in_words(
        (attention + rest) * len(ways) * (rounds + 4),  # warm-up, observation, and a forward that plans in each
        heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=dtype,
        device=device,
    )
    progress(f"{name}{expected}")
    able, failed = tried({key: runner.arm(way) for key, way in ways.items()}, device)
    progress(name)
    peers = {key for key in able if ways[key].kind == "dense"}
    if not peers:
        raise BenchmarkError(f"{name}: the dense model cannot run: {failed}")
    times = interleaved(
        able, rounds=rounds, device=device, threads=torch.get_num_threads(), on_round=lambda: progress(name)
    )
    best = min(peers, key=lambda key: times[key].median)
    observed = {key: runner.observe(ways[key], device) for key in able}
    return ModelRow(
        shape=shape.name,
        model=model.kind,
        config=dict(model.config),
        parameters=parameters,
        layers=runner.layers,
        tokens=shape.tokens,
        grid=shape.grid,
        dtype=_name(dtype),
        map=map_name,
        settings=method.settings(),
        density=plan.density,
        by_operations=Bound.of(attention / (attention + rest), plan.density),
        by_time=Bound.of(observed[best].share, plan.density),
        best_dense=best,
        arms={key: _arm(ways[key], times[key], times[best].median, observed[key]) for key in able},
        refused=refused | failed,
    )


def operations(model: models.TrueModel, layers: int, parameters: int) -> tuple[int, int]:
    """Floating-point operations of a dense forward: of attention's products, and 2 a parameter and token elsewhere."""
    shape = model.shape
    return 4 * layers * shape.heads * shape.head_dim * shape.tokens**2, 2 * parameters * shape.tokens


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _queries(model: models.TrueModel, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    shape = model.shape
    return torch.empty(1, shape.tokens, shape.heads, shape.head_dim, dtype=dtype, device=device).transpose(1, 2)


def _arm(way: Way, times: Times, best: float, observed: Observed) -> ModelArm:
    return ModelArm(
        kind=way.kind,
        ms=1e3 * times.median,
        ms_best=1e3 * min(times.total),
        ms_worst=1e3 * max(times.total),
        speedup=best / times.median,
        attention_ms=1e3 * observed.attention_seconds,
        peak_bytes=observed.peak_bytes,
        kernels=observed.kernels,
    )
