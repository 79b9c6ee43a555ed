"""What attaching costs when it saves nothing: the miniature's transformer without us, and with us where all is dense.

    python benchmarks/seam.py --threads 2 --output benchmarks/results/seam-cpu.json

Every arm is a run of several steps, so that what happens once a run (the first look at every layer's output) has its
share. On the grid of the default video the share of a step is what a user pays; on a grid of one token hardly anything
is left of a step but Python, so that the difference a call is the seam's own (root hooks included, spread over layers),
with caches that the rest of the model has emptied. ``call``: one layer's attention again and again, on one token: the
seam's Python alone. What a copy that is not attached seems to cost is noise.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

import falloff
from falloff import miniature
from falloff.evaluation.bench import record
from falloff.evaluation.bench.timing import Arm, Times, interleaved, tried
from falloff.evaluation.bench.ways import EveryBlock

NATIVE, COPY = "native", "a copy, not attached"
ATTACHED: dict[str, tuple[falloff.Method, falloff.Schedule]] = {
    "every block on": (EveryBlock(), falloff.Schedule(dense_first=0, dense_last=0, dense_layers=())),
    "kept dense": (falloff.Radial(), falloff.Schedule(dense_first=1.0)),
}
GRIDS = {(17, 16, 16): (3, 25), (1, 1, 1): (50, 60)}
"""Steps a run and rounds, by grid: a step of one token takes little time, and differs by little."""


def run(model: WanTransformer3DModel, given: dict[str, Tensor], steps: int) -> Tensor:
    with torch.inference_mode():
        for time in torch.linspace(1000, 1, steps).split(1):
            out: Tensor = model(**given, timestep=time, return_dict=False)[0]
    return out


def arguments(model: WanTransformer3DModel, grid: tuple[int, int, int]) -> dict[str, Tensor]:
    sides = (side * patch for side, patch in zip(grid, model.config.patch_size, strict=True))
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, model.config.in_channels, *sides, generator=generator),
        "encoder_hidden_states": torch.randn(1, 16, model.config.text_dim, generator=generator),
    }


def attached_models() -> tuple[WanTransformer3DModel, dict[str, WanTransformer3DModel]]:
    native = WanTransformer3DModel.from_pretrained(miniature.path(), subfolder="transformer").eval()
    models = {NATIVE: native, COPY: copy.deepcopy(native)}
    for name, (method, schedule) in ATTACHED.items():
        models[name] = falloff.enable(copy.deepcopy(native), method, schedule=schedule)
    return native, models


def timed(arms: dict[str, Arm], rounds: int) -> dict[str, Times]:
    able, refused = tried(arms, torch.device("cpu"))
    if refused:
        raise SystemExit(f"cannot measure {refused}")
    return interleaved(able, rounds=rounds, device=torch.device("cpu"), threads=torch.get_num_threads())


def costs(times: dict[str, Times], calls: int, steps: int = 1) -> dict[str, dict[str, float]]:
    base = times[NATIVE]
    return {
        name: cost([a - b for a, b in zip(times[name].total, base.total, strict=True)], base.median, calls * steps)
        for name in times
        if name != NATIVE
    }


def measure(grid: tuple[int, int, int], steps: int, rounds: int) -> dict[str, Any]:
    native, models = attached_models()
    given = arguments(native, grid)
    times = timed({name: Arm(partial(run, model, given, steps)) for name, model in models.items()}, rounds)
    layers = len(native.blocks)
    row: dict[str, Any] = {"grid": "x".join(map(str, grid)), "layers": layers, "steps": steps, "rounds": rounds}
    row["native_ms"] = 1e3 * times[NATIVE].median / steps
    return {**row, "attached": costs(times, layers, steps)}


def measure_call(count: int = 50, rounds: int = 200) -> dict[str, Any]:
    native, models = attached_models()
    given = arguments(native, (1, 1, 1))
    layer = "blocks.0.attn1"
    hidden = torch.randn(1, 1, native.config.num_attention_heads * native.config.attention_head_dim)
    rotary = native.rope(given["hidden_states"])

    def calls(model: WanTransformer3DModel) -> Tensor:
        attention = model.get_submodule(layer)
        with torch.inference_mode():
            for _ in range(count):
                out: Tensor = attention(hidden, None, None, rotary)
        return out

    for model in models.values():
        run(model, given, 1)  # tells the seam the grid
    times = timed({name: Arm(partial(calls, model)) for name, model in models.items()}, rounds)
    base = times[NATIVE]
    row: dict[str, Any] = {"call": layer, "calls": count, "rounds": rounds, "native_us": 1e6 * base.median / count}
    return {**row, "attached": costs(times, count)}


def cost(more: list[float], native: float, calls: int) -> dict[str, float]:
    """Of seconds that one arm took more than the native one, round by round: the median's share of a step and call."""
    return {"share_of_step": median(more) / native, "us_a_call": 1e6 * median(more) / calls}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for grid, (steps, rounds) in GRIDS.items():
        rows.append(measure(grid, steps, rounds))
        print(json.dumps(rows[-1]), flush=True)
    rows.append(measure_call())
    print(json.dumps(rows[-1]), flush=True)
    record.write(given.output, shlex.join(["python", *sys.argv]), torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
