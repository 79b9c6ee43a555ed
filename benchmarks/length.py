"""Longer videos by a LoRA, measured on the miniature: tuned with Radial Attention against tuned dense, at equal steps.

    python benchmarks/length.py WORK --steps 30 --output benchmarks/results/length-cpu.json

Both tunings go on in turns, a third of the steps each, so that a machine that slows down favours none. Each is
validated with its own attention on the same clips, noise and noise levels. Work in WORK is gone on with when it is
interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

import falloff
from falloff import miniature
from falloff.evaluation.bench import record
from falloff.miniature.clips import write_clips
from falloff.miniature.digits import held_out_prompts
from falloff.miniature.judge import train_classifier
from falloff.miniature.measure import call_arguments, score, verdicts
from falloff.training import Course, Lora, Size, train_lora
from falloff.training.adapter import loaded

TURNS = 3
ARMS: dict[str, tuple[falloff.Method, falloff.Schedule]] = {
    "dense": (falloff.Full(), falloff.Schedule(dense_first=0, dense_layers=())),
    # Decay 1 as published for four times the length; two dense layers of forty are none of six.
    "radial": (falloff.Radial(decay=1.0), falloff.Schedule(dense_first=1, dense_layers=())),
}
"""Method and what stays dense, in training and afterwards."""
COUNT = 24
"""Clips to tune on and to validate with."""


def load() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(miniature.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tune(work: Path, arm: str, frames: int, steps: int, rate: float, rank: int) -> None:
    """To ``steps`` steps in all."""
    method, schedule = ARMS[arm]
    call = call_arguments(miniature.path())
    size = Size(frames=frames, height=call["height"], width=call["width"])
    lora = Lora(size=size, trained_frames=call["num_frames"], rank=rank, validation=4, samples=0)
    course = Course(steps=steps, rate=rate, warmup=3, save_every=5, check_every=10**6)
    train_lora(
        load(),
        work / "clips",
        work / arm,
        method,
        lora,
        course,
        schedule=schedule,
        call=call,
        cache=work / "cache",
        progress=lambda doing, done, total: print(f"{arm}: {doing}, {done} of {total}", file=sys.stderr, flush=True),
    )


def course_of(work: Path, arm: str) -> dict[str, Any]:
    """Validation losses by step, and the median seconds of a step."""
    lines = [json.loads(line) for line in (work / arm / "log.jsonl").read_text().splitlines()]
    return {
        "validation": {line["step"]: line["validation"] for line in lines if "validation" in line},
        "seconds_a_step": median(line["seconds"] for line in lines if "seconds" in line),
    }


def generate(pipe: WanPipeline, prompt: str, seed: int, frames: int) -> tuple[np.ndarray, float]:
    call = call_arguments(miniature.path()) | {"num_frames": frames}
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    video = pipe(prompt=prompt, generator=generator, output_type="np", **call).frames[0]
    return np.asarray(video, dtype=np.float32), time.perf_counter() - began


def prompted(work: Path, frames: int, prompts: int) -> dict[str, Any]:
    """The judge's scores of every arm, untuned and tuned, the arms in turn; kept line by line in WORK."""
    classifier, pipe = train_classifier(work / "judge.safetensors"), load()
    file = work / "prompts.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(r["arm"], r["tuned"], r["seed"]) for r in records}
    for seed, prompt in enumerate(held_out_prompts(prompts)):
        for arm, (method, schedule) in ARMS.items():
            for tuned in (False, True):
                if (arm, tuned, seed) in done:
                    continue
                with falloff.using(pipe, method, schedule=schedule):
                    if tuned:
                        with loaded(pipe, work / arm):
                            clip, seconds = generate(pipe, prompt, seed, frames)
                    else:
                        clip, seconds = generate(pipe, prompt, seed, frames)
                made = {"arm": arm, "tuned": tuned, "seed": seed, "prompt": prompt, "seconds": seconds}
                records.append({**made, "verdicts": verdicts(classifier, clip, prompt)})
                with file.open("a") as lines:
                    lines.write(json.dumps(records[-1]) + "\n")
    rows = {}
    for arm in ARMS:
        for tuned in (False, True):
            own = [r for r in records if (r["arm"], r["tuned"]) == (arm, tuned) and r["seed"] < prompts]
            rows[f"{arm}, {'tuned' if tuned else 'untuned'}"] = {
                **score(own),
                "seconds": median(r["seconds"] for r in own),
            }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="folder for clips, cache and trainings")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--frames", type=int, default=257)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=0, help="held-out prompts to judge, none unless given")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    if not (given.work / "clips").exists():
        write_clips(given.work / "clips", COUNT, given.frames, seed=1)
    for turn in range(TURNS):
        for arm in ARMS:
            tune(given.work, arm, given.frames, given.steps * (turn + 1) // TURNS, given.rate, given.rank)
    arms = {arm: course_of(given.work, arm) for arm in ARMS}
    row: dict[str, Any] = {
        "frames": given.frames,
        "steps": given.steps,
        "rate": given.rate,
        "rank": given.rank,
        "arms": arms,
        "times_less_tuning": arms["dense"]["seconds_a_step"] / arms["radial"]["seconds_a_step"],
    }
    if given.prompts:
        row["prompts"] = prompted(given.work, given.frames, given.prompts)
    record.write(given.output, shlex.join(["python", *sys.argv]), torch.device("cpu"), [row])
    print(json.dumps(row, indent=1))


if __name__ == "__main__":
    main()
