"""A diffusion from clips to a LoRA: the whole way of a training by velocities of a scheduler's table."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_cogvideox import cogvideox

import falloff
from falloff import Schedule
from falloff.training import Course, Lora, Size, train_lora
from falloff.training.adapter import RECIPE, WEIGHTS, loaded

SIZE = Size(frames=9, height=32, width=32)
CALL = {"num_inference_steps": 2, "max_sequence_length": 8, "guidance_scale": 2.0}


class Stopped(Exception):
    pass


def stop(doing: str, done: int, total: int) -> None:
    if doing.startswith("training") and done == 3:
        raise Stopped


def tune(clips: Path, folder: Path, name: str, steps: int = 4, **more: Any) -> Any:
    pipe = cogvideox(patched_frames=name.startswith("1.5"))
    lora = Lora(size=SIZE, trained_frames=9, rank=4, validation=1, samples=1)
    course = Course(steps=steps, rate=0.02, warmup=0, save_every=2, check_every=steps)
    settings = {"schedule": Schedule(dense_first=0, dense_layers=()), "call": CALL, "cache": folder / "cache"}
    train_lora(pipe, clips, folder / name, falloff.Radial(block=4), lora, course, **settings, **more)
    return pipe


def entries(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in found]


@pytest.mark.parametrize("version", ["1.0", "1.5"])
def test_a_lora_is_trained_and_goes_on_bit_for_bit(clips: Path, tmp_path: Path, version: str) -> None:
    tune(clips, tmp_path, f"{version} whole")
    with pytest.raises(Stopped):
        tune(clips, tmp_path, f"{version} cut", progress=stop)
    pipe = tune(clips, tmp_path, f"{version} cut")
    whole, cut = tmp_path / f"{version} whole", tmp_path / f"{version} cut"
    assert entries(cut) == entries(whole)
    ours, theirs = load_file(cut / WEIGHTS), load_file(whole / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert len(list((whole / "samples").glob("*.mp4"))) == 2
    pipe.unload_lora_weights()
    with loaded(pipe, whole), falloff.using(pipe, falloff.Recipe.load(whole / RECIPE)) as tuned:
        assert falloff.Recipe.load(whole / RECIPE).evidence["grid_frames"] == (3 if version == "1.0" else 2)
        assert "falloff" in tuned.transformer.peft_config


def test_it_learns(clips: Path, tmp_path: Path) -> None:
    tune(clips, tmp_path, "1.0", steps=60)
    first, *_, last = [entry["validation"] for entry in entries(tmp_path / "1.0") if "validation" in entry]
    assert last < 0.97 * first
