"""Sparse attention kernels against dense attention, interleaved in one process.

    python benchmarks/attention.py --threads 2 --output benchmarks/results/attention-cpu.json

Each row is a shape and a block map: a random one with its diagonal on, or Radial Attention's on frames of 16 x 16
tokens. Speed-up is over the fastest dense arm of the same
dtype; efficiency is speed-up times density, 1 being ideal. Times are medians of interleaved rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.evaluation import files
from falloff.evaluation.machine import describe, versions
from falloff.geometry import Grid, Sequence
from falloff.kernels import available, choose, run
from falloff.kernels.errors import UnsupportedError
from falloff.kernels.launch import build
from falloff.methods import Call, Radial, State
from falloff.plan import BlockMap, Plan, dense_plan

Arm = Callable[[], Tensor]
SAMPLED_ROWS = 64
SPARSE = {"float32": ("cpu",), "bfloat16": ("cpu", "cpu-tile")}  # the reference needs a full mask


@dataclass(frozen=True)
class Row:
    heads: int
    head_dim: int
    tokens: int
    block: int
    density: float | None
    """Of a random map; ``None``: Radial Attention's own."""
    dtype: str


ROWS = (
    Row(4, 64, 8192, 128, 0.26, "float32"),
    Row(4, 64, 8192, 128, 0.26, "bfloat16"),
    Row(4, 32, 4352, 64, 0.26, "float32"),
    Row(4, 32, 4352, 64, None, "float32"),
    Row(4, 32, 16640, 64, None, "float32"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; default: standard output only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--row", action="append", metavar="H,D,N,BLOCK,DENSITY|radial,DTYPE", help="measure this instead; repeatable"
    )
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = [parse_row(text) for text in given.row] if given.row else ROWS
    results = []
    for row in rows:
        results.append(asdict(row) | measure_row(row, given.rounds, given.threads))
        print(json.dumps(results[-1]), flush=True)
    if given.output:
        result = {
            "command": "python " + " ".join(sys.argv),
            "machine": describe(torch.device("cpu")),
            "versions": versions(),
            "kernels": available(),
            "rows": results,
        }
        files.write(given.output, json.dumps(result, indent=1) + "\n")


def parse_row(text: str) -> Row:
    heads, head_dim, tokens, block, density, dtype = text.split(",")
    share = None if density == "radial" else float(density)
    return Row(int(heads), int(head_dim), int(tokens), int(block), share, dtype)


def measure_row(row: Row, rounds: int, threads: int) -> dict[str, object]:
    """All arms of one row: dense, then every kernel that can run, with the reason for those that cannot."""
    generator = torch.Generator().manual_seed(0)
    plan = radial_plan(row) if row.density is None else random_plan(row, row.density, generator)
    shape = (1, row.heads, row.tokens, row.head_dim)
    q, k, v = (torch.randn(shape, generator=generator).to(getattr(torch, row.dtype)) for _ in range(3))
    dense = {"sdpa": lambda: F.scaled_dot_product_attention(q, k, v)}
    sparse: dict[str, Arm] = {}
    empty: dict[str, str] = {}
    everything = dense_plan(row.tokens, row.tokens)
    for name in SPARSE[row.dtype]:
        try:
            choose(plan, q, impl=name, needs_lse=False)
        except UnsupportedError as reason:
            empty[name] = str(reason)
            continue
        sparse[name] = lambda name=name: run(plan, q, k, v, impl=name)[0]
        if name == "cpu-tile":  # its gain over SDPA is not sparsity's: the honest dense peer uses it too
            dense["dense cpu-tile"] = lambda: run(everything, q, k, v, impl="cpu-tile")[0]
    with torch.no_grad():
        seconds = interleaved({**dense, **sparse}, rounds, threads)
        errors = {name: sampled_error(arm(), plan, q, k, v) for name, arm in sparse.items()}
    best = min(dense, key=lambda name: seconds[name])
    pairs = {**dict.fromkeys(dense, row.heads * row.tokens**2), **dict.fromkeys(sparse, plan_pairs(plan, row.heads))}
    return {
        "actual_density": plan.density,
        "planning_ms": 1e3 * planning_seconds(plan, row.heads, rounds),
        "best_dense": best,
        "arms": {name: arm_result(name, seconds, best, pairs, plan, row, errors) for name in seconds},
        "empty": empty,
    }


def arm_result(
    name: str,
    seconds: dict[str, float],
    best: str,
    pairs: dict[str, int],
    plan: Plan,
    row: Row,
    errors: dict[str, float],
) -> dict[str, float]:
    result = {
        "ms": 1e3 * seconds[name],
        "gflops": 4e-9 * row.head_dim * pairs[name] / seconds[name],
        "speedup": seconds[best] / seconds[name],
        "speedup_over_sdpa": seconds["sdpa"] / seconds[name],
    }
    if name in errors:
        result |= {"efficiency": result["speedup"] * plan.density, "relative_error": errors[name]}
    return result


def random_plan(row: Row, density: float, generator: torch.Generator) -> Plan:
    """A map for each head."""
    blocks = -(-row.tokens // row.block)
    beside_diagonal = (density * blocks - 1) / (blocks - 1)
    chosen = torch.rand((row.heads, blocks, blocks), generator=generator) < beside_diagonal
    chosen |= torch.eye(blocks, dtype=torch.bool)
    size = row.block
    return Plan(q_len=row.tokens, kv_len=row.tokens, q_sizes=size, kv_sizes=size, blocks=BlockMap.from_dense(chosen))


def radial_plan(row: Row) -> Plan:
    """One map for all heads."""
    empty = torch.empty(0)
    sequence = Sequence(Grid(row.tokens // 256, 16, 16))
    plan = Radial(block=row.block).plan(Call(sequence=sequence), empty, empty, empty, State())
    assert isinstance(plan, Plan)
    return plan


def plan_pairs(plan: Plan, heads: int) -> int:
    return plan.pairs * heads // plan.blocks.shape[1]


def interleaved(arms: dict[str, Arm], rounds: int, threads: int) -> dict[str, float]:
    """Median seconds of each arm; every round runs all of them once. Refuses if the thread count changes."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for warm_up in [True] + [False] * rounds:
        for name, arm in arms.items():
            begin = time.perf_counter()
            arm()
            elapsed = time.perf_counter() - begin
            if torch.get_num_threads() != threads:
                raise SystemExit(f"{name} ran with {torch.get_num_threads()} threads, expected {threads}: not reported")
            if not warm_up:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def planning_seconds(plan: Plan, heads: int, rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        build(plan, 1, heads)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def sampled_error(out: Tensor, plan: Plan, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative L2 error of evenly spaced rows against a float32 softmax over the blocks they keep."""
    size = plan.q_sizes
    assert isinstance(size, int), "the benchmark's maps are uniform"
    rows = torch.linspace(0, plan.q_len - 1, SAMPLED_ROWS).long()
    kept = plan.blocks.dense()[0][:, rows // size].repeat_interleave(size, -1)[..., : plan.kv_len]
    scores = q[0, :, rows].float() @ k[0].float().mT * q.shape[-1] ** -0.5
    expected = scores.masked_fill(~kept, -torch.inf).softmax(-1) @ v[0].float()
    return float((out[0, :, rows].float() - expected).norm() / expected.norm())


if __name__ == "__main__":
    main()
