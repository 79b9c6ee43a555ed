"""The committed rows of ``falloff bench attention``, in one file.

    python benchmarks/attention.py --threads 2 --output benchmarks/results/attention-cpu.json

The command line measures one combination of shapes, maps and blocks; these rows need several. On a machine with a GPU
they are of the GPU, at the sizes of real models.
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


def works(*rows: tuple[str, str, int, str, bool]) -> tuple[Work, ...]:
    return tuple(
        Work(shape=shape_of(shape), map=block_map, block=block, dtype=dtype, backward=backward)
        for shape, block_map, block, dtype, backward in rows
    )


WORKS = {
    "cpu": works(
        ("4,64,8192", "random:0.26", 128, "float32", False),
        ("4,64,8192", "random:0.26", 128, "bfloat16", False),
        # the miniature's calls at its default length, and at four times that
        ("4,32,17x16x16", "random:0.26", 64, "float32", False),
        ("4,32,17x16x16", "radial", 64, "float32", False),
        ("4,32,65x16x16", "radial", 64, "float32", False),
    ),
    "cuda": works(
        ("wan14b-720p", "random:0.2", 128, "bfloat16", False),
        ("wan14b-720p", "random:0.2", 128, "bfloat16", True),
        ("wan14b-720p", "radial", 128, "bfloat16", False),
        ("wan1.3b-480p", "radial", 128, "bfloat16", True),
        ("hunyuan-720p", "radial", 128, "bfloat16", False),
    ),
}
KERNELS = {
    "cpu": {"float32": ("cpu-simd", "cpu", "flex"), "bfloat16": ("cpu-amx", "cpu-simd", "cpu", "cpu-tile")},
    "cuda": {"bfloat16": ()},
}
"""Those to measure; where none is named, all but the reference."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for work in WORKS[device.type]:
        row = measure(work, device=device, kernel_names=KERNELS[device.type][work.dtype], rounds=given.rounds)
        rows.append(row.to_dict())
        print(json.dumps(rows[-1]), flush=True)
    record.write(given.output, shlex.join(["python", *sys.argv]), device, rows)


if __name__ == "__main__":
    main()
