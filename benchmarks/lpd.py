"""Parallel decoding measured: quality and time of fewer steps on the image miniature, orders, costs, attention.

python benchmarks/lpd.py --output benchmarks/results/lpd-cpu.json

Where there is a GPU, the latency of a random model of the published size XL is measured there besides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from falloff.decoding.diagnostics import attention_by_distance, cost
from falloff.decoding.order import ORDER_NAMES, Locality, make_orders
from falloff.decoding.pipeline import LPDPipeline
from falloff.decoding.sizes import group_sizes
from falloff.decoding.tokenizer import VQTokenizer
from falloff.decoding.transformer import SIZES, LPDTransformer
from falloff.evaluation import files
from falloff.evaluation.machine import PeakMemory, describe, versions
from falloff.miniature import images
from falloff.miniature.digits import held_out_scans
from falloff.miniature.images.measure import WAYS, Judge, compare, limits
from falloff.miniature.images.pictures import pictures

GRIDS = ((16, 20, 2), (16, 32, 2), (32, 48, 4))
"""Side in tokens, steps, repulsion: as published."""


XL_CALL: dict[str, Any] = {"class_labels": 0, "num_inference_steps": 20, "guidance_scale": 4.9, "output_type": "pt"}
"""As published for 256 x 256 px."""


def alone(pipe: LPDPipeline, ways: Mapping[str, Mapping[str, Any]], repeats: int = 5) -> dict[str, dict[str, Any]]:
    """Seconds of one picture alone in its batch, the ways in turn; and how many times faster than the first way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    pipe(0, num_inference_steps=2)
    for number in range(repeats):
        for name, arguments in ways.items():
            generator = torch.Generator().manual_seed(number)
            began = time.perf_counter()
            pipe(number % 10, generator=generator, output_type="pt", **arguments)
            seconds[name].append(time.perf_counter() - began)
    first = next(iter(seconds.values()))
    return {
        name: {"seconds": each, "times_faster": median(a / b for a, b in zip(first, each, strict=True))}
        for name, each in seconds.items()
    }


def latency_of_xl(repeats: int = 20) -> dict[str, Any] | None:
    """Seconds of one picture by a random model of size XL in bfloat16; ``None`` without a GPU."""
    if not torch.cuda.is_available():
        return None
    with torch.device("cuda"):
        pipe = LPDPipeline(LPDTransformer(**SIZES["XL"]).bfloat16().eval(), VQTokenizer().eval())
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {"machine": describe(torch.device("cuda")), "call": XL_CALL}
    for name in ("steps of their own shapes", "compiled"):
        if name == "compiled":
            pipe.compile_decoding(mode="reduce-overhead")
        memory, seconds = PeakMemory(torch.device("cuda")), []
        for number in range(3 + repeats):
            generator = torch.Generator("cuda").manual_seed(number)
            torch.cuda.synchronize()
            began = time.perf_counter()
            pipe(generator=generator, **XL_CALL)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        found[name] = {"median_seconds": median(seconds[3:]), "seconds": seconds[3:], "peak_bytes": memory.read()}
    return found


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
    scans, labels = pictures(held_out_scans)
    chosen = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))[:count]
    tokens = pipe.vae.encode(scans[chosen]).flatten(1)
    orders = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)).argsort(dim=1)
    sizes = group_sizes(pipe.transformer.tokens, pipe.transformer.tokens)
    found = attention_by_distance(pipe.transformer, tokens, labels[chosen], orders, sizes)
    return [[None if value != value else value for value in layer] for layer in found.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        default=images.path(),
        help="folder made by python -m falloff.miniature.images; the shipped one by default",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--samples", type=int, default=500, help="pictures for each way")
    parser.add_argument("--guidance", type=float, nargs="+", default=[2.0], help="scales; every way is run at each")
    arguments = parser.parse_args()
    pipe = LPDPipeline.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    judge = Judge()
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
        "alone": alone(pipe, ways),
        "orders": order_times(),
        "costs": costs(pipe),
        "attention_by_distance": attention(pipe),
        "xl": latency_of_xl(),
    }
    for name, row in {**result["limits"], **result["ways"]}.items():
        distance = "-" if row["frechet"] is None else f"{row['frechet']:.4f}"
        print(f"{name:<36} accuracy {row['accuracy']:.3f}  Frechet {distance}")
    files.write(arguments.output, json.dumps(result, indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
