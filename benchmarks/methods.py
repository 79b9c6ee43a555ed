"""All methods on the bundled miniature at about one density, with one schedule: which keeps most, which is fastest?

    python benchmarks/methods.py --frames 65 --density 0.25 --output benchmarks/results/methods-miniature-065.json

Every video is kept in a folder beside the output (delete it when all is done): run the same command again after an
interruption, or with more --prompts, and it goes on. For the figures of the prompts done so far, ask for no more.

Each method's setting is the one of a ladder whose density, measured on the model's own queries and keys in one dense
run, is nearest to the one asked for. Contour, whose looks take time, is also shown with FEWER of those pairs. Pictures
of the maps go to docs/pictures.
"""

from __future__ import annotations

import argparse
import base64
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import falloff
from falloff import miniature
from falloff.cli import pipeline
from falloff.cli.checkpoint import find
from falloff.cli.compare import PROMPTS
from falloff.evaluation import figures, files
from falloff.evaluation.charts import block_map_png
from falloff.evaluation.compare import compare
from falloff.evaluation.generate import generate
from falloff.evaluation.kept import Kept
from falloff.evaluation.probe import Probe
from falloff.evaluation.recall import RecallObserver
from falloff.methods import Method
from falloff.miniature.digits import held_out_prompts

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
SCHEDULE = falloff.Schedule(dense_first=0.25, dense_layers=())
FEWER = 0.6
SHARES = (0.02, 0.05, 0.08, 0.12, 0.16, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def ladders() -> dict[str, list[Method]]:
    """Settings of every method from sparse to dense, by label; blocks fit the miniature's frames of 256 tokens."""
    return {
        "radial": [falloff.Radial(decay=decay, block=64) for decay in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)],
        "radial disc": [
            falloff.Radial(decay=decay, block=64, window="disc", order="hilbert")
            for decay in (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
        ],
        "svg1": [falloff.SVG1(density=share, block=64) for share in SHARES],
        "svg2": [falloff.SVG2(mass=share, min_share=0.02) for share in SHARES],
        "svg2 summary": [falloff.SVG2(mass=share, min_share=0.02, summary=True) for share in SHARES],
        "adaspa": [falloff.AdaSpa(sparsity=1 - share) for share in SHARES],
        "sta": [
            falloff.SlidingTile(tile=tile, window=window)
            for tile in ((2, 4, 4), (4, 4, 4))
            for window in ((1, 3, 3), (3, 1, 1), (3, 3, 3), (5, 3, 3), (3, 5, 5), (5, 5, 5))
        ],
        "xattention": [falloff.XAttention(tau=share, block=64) for share in SHARES],
        "sparge": [falloff.SpargeAttn(keep=share, q_block=64) for share in SHARES],
        "vsa": [falloff.VSA(sparsity=1 - share, tile=(2, 4, 8)) for share in SHARES],
        "pbs": [falloff.PBS(tau=share, block=64) for share in SHARES],
        "anchor": [
            falloff.Anchor(theta=theta, block=64, step=4, initial=64)
            for theta in (0, 0.5, 1, 1.5, 2, 3, 4, 5, 6, 8, 10)
        ],
        "hyper": [falloff.Hyper(block=block) for block in (64, 128, 256, 384, 512, 768, 1024)],
        "contour": [falloff.Contour(density=share) for share in SHARES],
    }


def nearest(pipe: Any, call: dict[str, Any], density: float) -> list[Method]:
    """Of each ladder the step whose plans come nearest to a density, in one dense run."""
    steps = ladders()
    flat = [method for ladder in steps.values() for method in ladder]
    observer = RecallObserver(methods=tuple(flat))
    with falloff.using(pipe, Probe(observers=(observer,), steps=1)):
        generate(pipe, PROMPTS[0], seed=0, call_arguments=call)
    found = dict(zip(flat, observer.found, strict=True))

    def distance(method: Method) -> float:
        by_layer = found[method].density_by_layer()
        return abs(sum(by_layer.values()) / len(by_layer) - density)

    return [min(ladder, key=distance) for ladder in steps.values()]


def prompts(count: int) -> list[str]:
    """The default ones first, then some that the miniature has not seen in training."""
    others = held_out_prompts(max(1, count)) if count > len(PROMPTS) else []
    return [*dict.fromkeys([*PROMPTS, *others])][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=65)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="the default ones, then others held out")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--pictures", action="store_true", help="draw the maps anew")
    given = parser.parse_args()
    if given.prompts < 1:
        parser.error(f"--prompts {given.prompts} must be at least 1")
    files.check_writable(given.output.parent)
    kept = given.output.with_suffix(".kept")
    torch.set_num_threads(given.threads)
    checkpoint = find(None)
    call = {**checkpoint.defaults, "num_frames": given.frames}
    with pipeline.quiet():
        pipe = pipeline.load(checkpoint)
        settings = repr((given.density, sorted(call.items()), ladders()))
        methods = Kept(kept).once(settings, lambda: nearest(pipe, call, given.density))
        methods = [*methods, falloff.Contour(density=FEWER * given.density)]
        for method in methods:
            print(method, flush=True)
        found = compare(
            pipe,
            prompts(given.prompts),
            methods,
            schedule=SCHEDULE,
            progress=lambda now: print(now.doing, flush=True) if now.done % 12 == 0 else None,
            fps=checkpoint.fps,
            kept=kept,
            **call,
        )
    values = found.to_dict() | {
        "model": miniature.path().parent.name,
        "command": shlex.join(["python", *sys.argv]),
        "density_asked": given.density,
    }
    files.write(given.output, json.dumps(values, indent=1, allow_nan=False) + "\n")
    if given.pictures:
        PICTURES.mkdir(parents=True, exist_ok=True)
        for label, arm in zip(ladders(), found.methods[:-1], strict=True):
            if arm.block_map is not None:
                png = base64.b64decode(block_map_png(arm.block_map).partition(",")[2])
                (PICTURES / f"map-{label.replace(' ', '-')}.png").write_bytes(png)
    Console().print(figures.table(found))


if __name__ == "__main__":
    main()
