"""Parallel decoding measured: quality and time of fewer steps on the image miniature, orders, costs, attention.

python benchmarks/lpd.py WORK/checkpoint --output benchmarks/results/lpd-cpu.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from falloff.decoding.diagnostics import attention_by_distance, cost
from falloff.decoding.order import ORDER_NAMES, Locality, make_orders
from falloff.decoding.pipeline import LPDPipeline
from falloff.decoding.sizes import group_sizes
from falloff.evaluation import files
from falloff.evaluation.machine import PeakMemory, describe, versions
from falloff.miniature.digits import held_out_scans
from falloff.miniature.images.measure import WAYS, Judge, compare, limits
from falloff.miniature.images.pictures import pictures

GRIDS = ((16, 20, 2), (16, 32, 2), (32, 48, 4))
"""Side in tokens, steps, repulsion: as published."""


def order_times(repeats: int = 30) -> list[dict[str, Any]]:
    """Milliseconds to make one order, median."""
    rows = []
    for side, steps, repulsion in GRIDS:
        for name in ORDER_NAMES:
            seconds = []
            for number in range(repeats):
                generator = torch.Generator().manual_seed(number)
                sizes, rule = group_sizes(side * side, steps), Locality(repulsion=repulsion)
                began = time.perf_counter()
                make_orders(name, side, side, sizes, 1, generator, locality=rule)
                seconds.append(time.perf_counter() - began)
            rows.append({"tokens": side * side, "steps": steps, "order": name, "milliseconds": 1e3 * median(seconds)})
    return rows


def costs(pipe: LPDPipeline) -> list[dict[str, Any]]:
    """Of one guided picture: counted, and the memory its call takes beyond the weights."""
    rows = []
    for steps in (20, 256):
        sizes = group_sizes(pipe.transformer.tokens, steps)
        pipe(0, sizes=sizes)  # what is allocated once is no cost of a picture
        memory = PeakMemory(torch.device("cpu"))
        pipe(0, sizes=sizes)
        counted = dataclasses.asdict(cost(pipe.transformer, sizes, guided=True))
        rows.append({"steps": steps, **counted, "peak_bytes": memory.beyond()})
    return rows


def attention(pipe: LPDPipeline, count: int = 16) -> list[list[float | None]]:
    """Attention to one token by distance, for each layer, on held-out pictures."""
    images, labels = pictures(held_out_scans)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
    tokens = pipe.vae.encode(images[chosen]).flatten(1)
    orders = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    sizes = group_sizes(pipe.transformer.tokens, pipe.transformer.tokens)
    found = attention_by_distance(pipe.transformer, tokens, labels[chosen], orders, sizes)
    return [[None if value != value else value for value in layer] for layer in found.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="folder made by python -m falloff.miniature.images")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=500, help="pictures for each way")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="scales; every way is run at each")
    arguments = parser.parse_args()
    pipe = LPDPipeline.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        judge = Judge(Path(folder) / "judge.pt")
    ways = {
        f"{name}, guidance {scale:g}": {**way, "guidance_scale": scale}
        for scale in arguments.guidance
        for name, way in WAYS.items()
    }
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": describe(torch.device("cpu")),
        "versions": versions(),
        "limits": limits(judge, pipe.vae),
        "ways": compare(pipe, judge, ways, arguments.samples),
        "orders": order_times(),
        "costs": costs(pipe),
        "attention_by_distance": attention(pipe),
    }
    for name, row in {**result["limits"], **result["ways"]}.items():
        taken = row.get("seconds_per_batch")
        print(f"{name:<36} accuracy {row['accuracy']:.3f}  Frechet {row['frechet']:.4f}  {taken or 0:.2f} s a batch")
    files.write(arguments.output, json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
