"""What tuning is worth, measured on the miniature: longer videos by a LoRA, and sparsity that is trained.

    python benchmarks/training.py length WORK --steps 60 --precision bf16 --output benchmarks/results/length-cpu.json
    python benchmarks/training.py sparse WORK --steps 60 --output benchmarks/results/sparse-cpu.json

``length``: four times the frames, tuned with Radial Attention against tuned dense. ``sparse``: SLA against the same
blocks alone and linear attention alone, tuned towards the dense model. All ways are tuned in turns, half of the
steps each, so that a machine that slows down favours none, and validated with their own attention on the same clips,
noise and noise levels. Work in WORK is gone on with when it is interrupted. With ``--precision bf16`` all ways are
tuned under autocast, and draw with a transformer in bfloat16.

Every way has the same number of steps, all of which tune its LoRA together with its branches where it has some. With
``--dense-kernel`` the dense way of ``length`` is tuned on that kernel with every block on, which may be faster than
PyTorch's own attention. When all is tuned, steps of all ways, and then of PyTorch's own too, are timed in turns.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import WanPipeline
from torch import Tensor

import falloff
from falloff import miniature
from falloff.evaluation import metrics, video
from falloff.evaluation.bench import record
from falloff.methods import METHODS
from falloff.methods.branch import Layer, Work
from falloff.methods.sla import Projected
from falloff.miniature.checkpoint import GENERATION
from falloff.miniature.clips import write_clips
from falloff.miniature.digits import held_out_prompts
from falloff.miniature.judge import train_classifier
from falloff.miniature.measure import call_arguments, score, verdicts
from falloff.training import Course, Lora, Size, Sparse, train_lora, train_sparse
from falloff.training.adapter import loaded

TURNS = 2
AVERAGED = 0.95
"""Decay of the average of the weights that is validated and kept: single clips pull far at rates worth having."""
TIMED = 5
"""Rounds in which every way takes a step for its time alone."""
CALL = call_arguments(miniature.path())


@dataclass(frozen=True)
class Way:
    """A method, what of a run stays dense, and the training in WORK that tuned it; ``None`` for the model as it is."""

    method: falloff.Method
    schedule: falloff.Schedule
    tuned: str | None = None
    kernel: str = "auto"


DENSE = Way(falloff.Full(), falloff.Schedule(dense_first=0, dense_layers=()))
EVERY_BLOCK = falloff.Radial(sink_frames=10**6, block=128)  # every frame a sink: all pairs
# Decay 1 and blocks of 128 as published for four times the length; two dense layers of forty are none of six.
RADIAL = Way(falloff.Radial(decay=1.0, block=128), falloff.Schedule(dense_first=1, dense_layers=()))


class LinearAlone(falloff.SLA):
    """Linear attention over all keys without its sparse part; its projection begins as the identity."""

    name: ClassVar[str] = "linear alone"

    def branch(self, layer: Layer) -> Projected:
        projected = OnlyLinear(layer.head_dim, linear_over="all", features=self.features)
        torch.nn.init.eye_(projected.proj.weight)
        return projected


class OnlyLinear(Projected):
    def forward(self, work: Work) -> Tensor:
        return super().forward(work) - work.out_BHND


METHODS[LinearAlone.name] = LinearAlone  # so that the recipe beside its weights can be read


def sparse_ways() -> dict[str, falloff.Method]:
    ways: dict[str, falloff.Method] = {}
    for density in (0.1, 0.05):
        name = f"{1 - density:.0%}"
        ways[f"SLA {name}"] = falloff.SLA(density=density)
        ways[f"blocks alone {name}"] = falloff.SpargeAttn(mode="topk", keep=density, q_block=64, kv_block=64)
    return {**ways, "linear alone": LinearAlone(density=1e-6, linear_over="all")}


def load(precision: str = "no") -> WanPipeline:
    """In float32; with "bf16" its transformer is in bfloat16, but for the modules that diffusers keeps in float32."""
    types = {"default": torch.float32, "transformer": torch.bfloat16 if precision == "bf16" else torch.float32}
    pipe = WanPipeline.from_pretrained(miniature.path(), dtype=types)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_turns(names: list[str], steps: int, tune: Callable[[str, Course], None], rate: float) -> None:
    for turn in range(TURNS):
        for name in names:
            done = steps * (turn + 1) // TURNS
            tune(name, course_at(rate, done))


def course_at(rate: float, steps: int) -> Course:
    return Course(steps=steps, rate=rate, warmup=3, ema=AVERAGED, save_every=5, check_every=10**6)


def told(name: str) -> Callable[[str, int, int], None]:
    def progress(doing: str, done: int, total: int) -> None:
        if doing.startswith("training"):
            print(f"{name}: {doing}, {done} of {total}", file=sys.stderr, flush=True)

    return progress


def course_of(folder: Path) -> dict[str, Any]:
    """Validation losses by step, and the median seconds of a step."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "validation": {line["step"]: line["validation"] for line in lines if "validation" in line},
        "seconds_a_step": median(line["seconds"] for line in lines if "seconds" in line),
    }


@contextmanager
def at_work(pipe: WanPipeline, way: Way, work: Path) -> Iterator[None]:
    """A way with all it has learned."""
    lora = nullcontext() if way.tuned is None else loaded(pipe, work / way.tuned)
    with falloff.using(pipe, way.method, schedule=way.schedule), lora:
        if way.method.learns:
            falloff.load_branches(pipe, work / str(way.tuned) / "branches.safetensors")
        yield


def judged(ways: Mapping[str, Way], work: Path, frames: int, prompts: int, precision: str) -> dict[str, dict[str, Any]]:
    """Of every way the judge's score, seconds a video and closeness to the first way's video of the same seed.

    The videos are left in WORK.
    """
    (work / "videos").mkdir(exist_ok=True)
    classifier, pipe = train_classifier(work / "judge.safetensors"), load(precision)
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for seed, prompt in enumerate(held_out_prompts(prompts)):
        reference = None
        for name, way in ways.items():
            with at_work(pipe, way, work):
                began = time.perf_counter()
                generator = torch.Generator().manual_seed(seed)
                call = CALL | {"num_frames": frames}
                made = pipe(prompt=prompt, generator=generator, output_type="np", **call).frames[0]
                seconds = time.perf_counter() - began
            clip = np.asarray(made, dtype=np.float32)
            video.write(work / "videos" / f"{seed}-{name}.mp4", clip, GENERATION["fps"])
            reference = clip if reference is None else reference
            psnr = metrics.psnr(torch.from_numpy(clip), torch.from_numpy(reference))
            records[name].append(
                {"verdicts": verdicts(classifier, clip, prompt), "seconds": seconds, "psnr": float(psnr)}
            )
            print(f"{name}: {prompt}, {seconds:.0f} s, {psnr:.1f} dB", file=sys.stderr, flush=True)
    return {
        name: {
            **score(own),
            "seconds": median(r["seconds"] for r in own),
            "psnr_db": mean(r["psnr"] for r in own) if name != next(iter(ways)) else None,
        }
        for name, own in records.items()
    }


def length(
    work: Path, steps: int, frames: int, prompts: int, rate: float, rank: int, precision: Any, dense_kernel: str | None
) -> dict[str, Any]:
    arms = {"dense": DENSE if dense_kernel is None else replace(DENSE, method=EVERY_BLOCK, kernel=dense_kernel)}
    arms["radial"] = RADIAL
    size = Size(frames=frames, height=CALL["height"], width=CALL["width"])
    common = Lora(size=size, trained_frames=CALL["num_frames"], rank=rank, validation=2, samples=0, precision=precision)

    def tune(name: str, way: Way, lora: Lora, course: Course) -> None:
        train_lora(
            load(),
            work / "clips",
            work / name,
            way.method,
            lora,
            course,
            schedule=way.schedule,
            kernel=way.kernel,
            call=CALL,
            cache=work / "cache",
            progress=told(name),
        )

    in_turns(list(arms), steps, lambda name, course: tune(name, arms[name], common, course), rate)
    timed = arms if dense_kernel is None else arms | {"PyTorch": DENSE}
    for done in range(1, 1 + TIMED):
        for name, way in timed.items():
            tune(f"{name}, timed", way, replace(common, validation=0), course_at(rate, done))
    row: dict[str, Any] = {"arms": {name: course_of(work / name) for name in arms}, "dense_kernel": dense_kernel}
    row["timed"] = {name: course_of(work / f"{name}, timed")["seconds_a_step"] for name in timed}
    if prompts:
        drawn = {"dense": DENSE, "radial": RADIAL}
        ways = {f"{name}, untuned": way for name, way in drawn.items()}
        ways |= {f"{name}, tuned": replace(way, tuned=name) for name, way in drawn.items()}
        row["prompts"] = judged(ways, work, frames, prompts, precision)
    return row


def sparse(work: Path, steps: int, frames: int, prompts: int, rate: float, rank: int, precision: Any) -> dict[str, Any]:
    methods, size = sparse_ways(), Size(frames=frames, height=CALL["height"], width=CALL["width"])
    common = Sparse(size=size, rank=rank, validation=8, samples=0, precision=precision)

    def tune(name: str, course: Course) -> None:
        train_sparse(
            load(),
            work / "clips",
            work / name,
            methods[name],
            common,
            course,
            schedule=DENSE.schedule,
            call=CALL,
            cache=work / "cache",
            progress=told(name),
        )

    in_turns(list(methods), steps, tune, rate)
    row: dict[str, Any] = {"arms": {name: course_of(work / name) for name in methods}}
    if prompts:
        ways = {"dense": DENSE, **{name: Way(way, DENSE.schedule, name) for name, way in methods.items()}}
        row["prompts"] = judged(ways, work, frames, prompts, precision)
    return row


EXPERIMENTS = {"length": (length, 257, 30, 48), "sparse": (sparse, 65, 60, 272)}
"""With their frames, their steps, and the clips to tune on and to validate with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("work", type=Path, help="folder for clips, cache and trainings")
    parser.add_argument("--steps", type=int, help="of every tuning")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--dense-kernel", help="kernel to tune dense attention on; PyTorch's own unless given")
    parser.add_argument("--prompts", type=int, default=0, help="held-out prompts to judge, none unless given")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    measure, frames, steps, clips = EXPERIMENTS[given.experiment]
    frames, steps = given.frames or frames, given.steps or steps
    if not (given.work / "clips").exists():
        write_clips(given.work / "clips", clips, frames, seed=1)
    settings = {"frames": frames, "steps": steps, "rate": given.rate, "rank": given.rank, "precision": given.precision}
    row = {"experiment": given.experiment, **settings}
    own = {"dense_kernel": given.dense_kernel} if given.experiment == "length" else {}
    row |= measure(given.work, prompts=given.prompts, **settings, **own)
    command = shlex.join(["python", *("WORK" if arg == str(given.work) else arg for arg in sys.argv)])
    record.write(given.output, command, torch.device("cpu"), [row])
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
