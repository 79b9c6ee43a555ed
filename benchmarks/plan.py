"""How long plans take to make: wall time on one core, median and spread, for sizes of real work.

python benchmarks/plan.py --output benchmarks/results/plan-cpu.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median

import torch

from falloff.evaluation import files
from falloff.evaluation.machine import describe, versions
from falloff.geometry import Grid, Sequence
from falloff.methods import Call, Radial, State
from falloff.plan import Plan

SIZES = {
    "miniature": Grid(17, 16, 16),
    "wan14b-480p": Grid(21, 30, 52),
    "wan14b-720p": Grid(21, 45, 80),
    "hunyuan-720p": Grid(33, 45, 80),
    "wan14b-720p-4x": Grid(81, 45, 80),
    "hunyuan-720p-4x": Grid(128, 45, 80),
}
METHODS = {
    "radial": Radial(block=128),
    "radial, decay 1": Radial(block=128, decay=1.0),
    "radial, published rule": Radial(block=128, mode="reference", frame_drop="published"),
    "radial, disc": Radial(block=128, window="disc", order="hilbert"),
}


def make(method: Radial, sequence: Sequence) -> Plan:
    empty = torch.empty(0)
    plan = method.plan(Call(sequence=sequence), empty, empty, empty, State())
    assert isinstance(plan, Plan)
    return plan


def measure(method: Radial, grid: Grid, repeats: int) -> dict[str, object]:
    sequence, seconds = Sequence(grid), []
    plan = make(method, sequence)  # warm-up: first use of numpy's and torch's operators
    for _ in range(repeats):
        start = time.perf_counter()
        plan = make(method, sequence)
        seconds.append(time.perf_counter() - start)
    return {
        "tokens": grid.tokens,
        "grid": str(grid),
        "blocks": plan.blocks.shape[2],
        "density": plan.density,
        "milliseconds": 1e3 * median(seconds),
        "milliseconds_best": 1e3 * min(seconds),
        "milliseconds_worst": 1e3 * max(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for size, grid in SIZES.items():
        for name, method in METHODS.items():
            row = {"size": size, "method": name, **measure(method, grid, arguments.repeats)}
            print(f"{size:>16} {name:<24} {row['tokens']:>7} tokens {row['milliseconds']:8.1f} ms")
            rows.append(row)
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe(torch.device("cpu")),
        "versions": versions(),
        "rows": rows,
    }
    files.write(arguments.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
