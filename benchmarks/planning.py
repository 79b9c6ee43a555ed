"""Memory that planning takes beyond its inputs: two calls of every method that looks at queries and keys.

    MALLOC_MMAP_THRESHOLD_=65536 python benchmarks/planning.py --shape 40,128,21x15x20 \\
        --output benchmarks/results/planning-cpu.json

Queries and keys are random, around centres that neighbours share, as many at every length: memory depends on shapes,
and on how many pairs of blocks a plan keeps, which of noise alone would be nearly all. The second call finds the state
that the first has left. A peak is of the process's resident memory, so it counts the plan itself, and what the C
library keeps of freed memory unless its variable above tells it to give that back; the code that a first call loads is
loaded before.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import falloff
from falloff.evaluation.bench import record
from falloff.evaluation.bench.shapes import Shape, shape_of
from falloff.evaluation.machine import PeakMemory
from falloff.geometry import Grid, Sequence
from falloff.methods.base import Call, Dense, Method, State

METHODS: dict[str, Method] = {
    "svg1": falloff.SVG1(),
    "svg2": falloff.SVG2(),
    "svg2 summary": falloff.SVG2(summary=True),
    "adaspa": falloff.AdaSpa(),
    "xattention": falloff.XAttention(),
    "sparge": falloff.SpargeAttn(),
    "vsa": falloff.VSA(),
    "pbs": falloff.PBS(),
    "anchor": falloff.Anchor(),
    "hyper": falloff.Hyper(),
    "contour": falloff.Contour(),
}
LAYERS, STEPS = 40, 50
CENTRES, SHARP = 98, 2.0
"""How many, each shared by tokens in a row, and how far they lie apart beside the noise of one token."""
THRESHOLD = "MALLOC_MMAP_THRESHOLD_"
"""A variable that the C library reads, and that the figures depend on."""


def tokens(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, H, N, D] of one set of centres, made head by head."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.empty(1, shape.heads, shape.tokens, shape.head_dim, dtype=dtype) for _ in range(2))
    centre = torch.arange(shape.tokens) * CENTRES // shape.tokens
    for head in range(shape.heads):
        centres = SHARP * torch.randn(int(centre[-1]) + 1, shape.head_dim, generator=generator)
        for x in (q, k):
            noise = torch.randn(shape.tokens, shape.head_dim, generator=generator)
            x[0, head] = (noise + centres[centre]) / SHARP
    return q, k


def rows(shape: Shape, sequence: Sequence, names: list[str], dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    q, k = tokens(shape, dtype)
    small = Sequence(Grid(2, 8, 8))
    few = torch.randn(1, 2, small.tokens, shape.head_dim).to(dtype)
    for name in names:
        METHODS[name].plan(Call(sequence=small), few, few, few, State())
        state = State()
        for number in range(2):
            call = Call(sequence=sequence, layer=1, layers=LAYERS, step=STEPS // 2 + number, steps=STEPS)
            memory = PeakMemory(q.device)
            plan = METHODS[name].plan(call, q, k, k, state)
            beyond = memory.beyond()
            yield {
                "method": name,
                "settings": METHODS[name].settings(),
                "call": number + 1,
                "density": 1.0 if isinstance(plan, Dense) else plan.density,
                "extra_bytes": beyond,
            }
            print(f"{name}, call {number + 1}: {(beyond or 0) / 1e6:.0f} MB", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="wan14b-720p")
    parser.add_argument("--method", action="append", choices=METHODS, help="repeatable; all unless given")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of queries and keys")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    shape = shape_of(given.shape)
    if shape.sequence is None:
        parser.error(f"--shape {given.shape} has no grid, and methods need one")
    told = {"shape": shape.name, "heads": shape.heads, "head_dim": shape.head_dim, "tokens": shape.tokens}
    told["dtype"] = given.dtype
    names = given.method or list(METHODS)
    found = [told | row for row in rows(shape, shape.sequence, names, getattr(torch, given.dtype))]
    told_to_c = [f"{THRESHOLD}={os.environ[THRESHOLD]}"] if THRESHOLD in os.environ else []
    record.write(given.output, shlex.join([*told_to_c, "python", *sys.argv]), torch.device("cpu"), found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
