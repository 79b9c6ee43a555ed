"""The committed rows of ``falloff bench attention``, in one file.

    python benchmarks/attention.py --threads 2 --output benchmarks/results/attention-cpu.json

The command line measures one combination of shapes, maps and blocks; these rows need several.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path

import torch

from falloff.evaluation.bench import record
from falloff.evaluation.bench.attention import Work, measure
from falloff.evaluation.bench.shapes import shape_of

WORKS = tuple(
    Work(shape=shape_of(shape), map=block_map, block=block, dtype=dtype)
    for shape, block_map, block, dtype in (
        ("4,64,8192", "random:0.26", 128, "float32"),
        ("4,64,8192", "random:0.26", 128, "bfloat16"),
        ("4,32,17x16x16", "random:0.26", 64, "float32"),
        ("4,32,17x16x16", "radial", 64, "float32"),
        ("4,32,65x16x16", "radial", 64, "float32"),
    )
)
"""The third and fourth are the miniature's calls at its default length, the last at four times that."""
KERNELS = {"float32": ("cpu-simd", "cpu", "flex"), "bfloat16": ("cpu-amx", "cpu-simd", "cpu", "cpu-tile")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cpu")
    rows = []
    for work in WORKS:
        row = measure(work, device=device, kernel_names=KERNELS[work.dtype], rounds=given.rounds)
        rows.append(row.to_dict())
        print(json.dumps(rows[-1]), flush=True)
    record.write(given.output, shlex.join(["python", *sys.argv]), device, rows)


if __name__ == "__main__":
    main()
