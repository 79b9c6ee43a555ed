"""Which tiles are fastest on this GPU, of those that could stand in a row of ``kernels/triton_tiles.py``.

    python benchmarks/tiles.py --output benchmarks/results/tiles-h200.json

Every candidate computes the same call, in turns with the others; the tile of the table is one of them. One that the
chip cannot hold, or that disagrees with the table's, is named with the reason. Put the fastest into the table by hand:
the tests hold every row to its chip's limits. Where there is no GPU it runs under TRITON_INTERPRET=1, for no figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

from falloff import kernels
from falloff.evaluation.bench import record
from falloff.evaluation.bench.arms import Inputs
from falloff.evaluation.bench.maps import plan_of
from falloff.evaluation.bench.shapes import Shape, shape_of
from falloff.evaluation.bench.timing import Arm, interleaved, tried
from falloff.kernels.triton import machine
from falloff.kernels.triton_tiles import HALF, Pass, Tile, head_class, tile_for
from falloff.plan import Plan

PRODUCTS: dict[Pass, int] = {"forward": 2, "dq": 3, "dkv": 4}
"""Of a tile of queries with one of keys."""
CANDIDATES: dict[Pass, tuple[Tile, ...]] = {
    "forward": (
        *(Tile(128, 128, warps, 3) for warps in (4, 8)),
        *(Tile(128, 64, 8, stages) for stages in (3, 5, 7)),
        Tile(128, 32, 8, 5),
        Tile(64, 128, 4, 3),
        *(Tile(64, 64, 4, stages) for stages in (3, 5)),
        Tile(64, 32, 4, 5),
    ),
    "dq": (
        *(Tile(128, 64, 8, stages) for stages in (3, 5)),
        Tile(128, 32, 8, 3),
        Tile(64, 128, 8, 3),
        *(Tile(64, 64, warps, 3) for warps in (4, 8)),
    ),
    "dkv": (
        *(Tile(128, other, 8, 3) for other in (32, 64)),
        Tile(64, 128, 8, 3),
        *(Tile(64, 64, 8, stages) for stages in (2, 3)),
        *(Tile(64, other, 4, 3) for other in (32, 64)),
    ),
}
TOLERANCE = 1e-2
"""Relative, between two tiles' results in 16 bits."""


def measure(
    phase: Pass, plan: Plan, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int
) -> dict[str, Any]:
    """Every candidate's median on one call; TFLOP/s over the pairs of the map."""
    inputs = Inputs.random(
        shape.heads, shape.tokens, shape.head_dim, dtype=dtype, device=device, backward=phase != "forward"
    )
    arch, half = machine(inputs.q)
    block, blocks = int(plan.q_sizes), plan.blocks.shape[2]
    listed = tile_for(arch, phase, shape.head_dim, half, block, plan.q_len / blocks)
    row = phase, head_class(shape.head_dim)
    tiles = dict.fromkeys((listed, *(tile for tile in CANDIDATES[phase] if max(tile[:2]) <= block)))
    arms = {str(tuple(tile)): one_pass(phase, plan, inputs, partial(only, arch, row, tile)) for tile in tiles}
    name = str(tuple(listed))
    with torch.set_grad_enabled(phase != "forward"):
        able, refused = tried(arms, device)
        if name not in able:
            sys.exit(f"the table's own tile {name} cannot run: {refused[name]}")
        expected = answer(arms[name])
        for other in able.keys() - {name}:
            pairs = zip(answer(arms[other]), expected, strict=True)
            off = max(float((got - want).norm() / want.norm()) for got, want in pairs)
            if not off <= TOLERANCE:
                refused[other] = f"it is off by {off:.2g} from the table's tile"
        able = {tile: arm for tile, arm in able.items() if tile not in refused}
        times = interleaved(able, rounds=rounds, device=device, threads=torch.get_num_threads())
    seconds = {tile: median(taken.backward or taken.forward) for tile, taken in times.items()}
    flops = 2 * PRODUCTS[phase] * plan.density * shape.tokens**2 * shape.heads * shape.head_dim
    return {
        "pass": phase,
        "shape": shape.name,
        "head_dim": shape.head_dim,
        "dtype": str(dtype).removeprefix("torch."),
        "block": block,
        "density": plan.density,
        "table": name,
        "fastest": min(seconds, key=seconds.__getitem__),
        "tiles": {
            tile: {"ms": 1e3 * taken, "tflops": flops / taken / 1e12}
            for tile, taken in sorted(seconds.items(), key=lambda item: item[1])
        },
        "refused": refused,
    }


@contextmanager
def only(arch: int, row: tuple[Pass, int], tile: Tile) -> Iterator[None]:
    """One tile alone in a row of the table."""
    table = HALF[arch]
    HALF[arch] = table | {row: (tile,)}
    try:
        yield
    finally:
        HALF[arch] = table


def one_pass(phase: Pass, plan: Plan, inputs: Inputs, around: Callable[[], AbstractContextManager[None]]) -> Arm:
    """The forward; or the backward of the one side's gradients, which is one kernel and the sum that both need."""
    q, k, v, d_out = inputs
    forward = partial(kernels.attend, plan, q, k, v, impl="triton")
    if d_out is None:
        return Arm(forward, around=around)
    wanted = (q,) if phase == "dq" else (k, v)
    q.requires_grad_(phase == "dq")
    k.requires_grad_(phase == "dkv")
    v.requires_grad_(phase == "dkv")
    return Arm(forward, lambda out: torch.autograd.grad(out, wanted, d_out), around)


def answer(arm: Arm) -> list[Tensor]:
    with arm.around():
        out = arm.forward()
        results = (out,) if arm.backward is None else arm.backward(out)
    return [x.detach().float() for x in results]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="repeatable; wan14b-720p unless given")
    parser.add_argument("--block", type=int, action="append", help="repeatable; 128 unless given")
    parser.add_argument("--pass", dest="phases", choices=get_args(Pass), action="append", help="all unless given")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (why := kernels.triton.absent()) is not None:
        sys.exit(f"the Triton kernel cannot run here: {why}")
    try:
        shapes = [shape_of(text) for text in given.shape or ["wan14b-720p"]]
        works = [
            (shape, plan_of(f"random:{given.density}", shape, block).to(device))
            for shape, block in product(shapes, given.block or [128])
        ]
    except ValueError as error:
        parser.error(str(error))
    rows = []
    for (shape, plan), phase in product(works, given.phases or get_args(Pass)):
        rows.append(measure(phase, plan, shape, getattr(torch, given.dtype), device, given.rounds))
        print(json.dumps(rows[-1], indent=1), flush=True)
        record.write(given.output, shlex.join(["python", *sys.argv]), device, rows)


if __name__ == "__main__":
    main()
