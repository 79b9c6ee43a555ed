"""Families whose text encoders are not Wan's, from clips and captions to a LoRA that is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from further_pipes import allegro, hunyuan_video15
from safetensors.torch import load_file
from torch import Tensor

import falloff
from falloff import Schedule
from falloff.training import Course, Lora, Size, train_lora
from falloff.training.adapter import RECIPE, WEIGHTS, loaded

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # between a scheduler and numpy
CALL = {"num_inference_steps": 2}
PIPES: dict[str, Callable[[], Any]] = {"HunyuanVideo 1.5": hunyuan_video15, "Allegro": allegro}
FRAMES = {"Allegro": 8}


def size(name: str) -> Size:
    return Size(frames=FRAMES.get(name, 9), height=32, width=32)


def latents(pipe: Any, size: Size) -> Tensor:
    call = {**CALL, "num_frames": size.frames, "height": size.height, "width": size.width}
    made: Tensor = pipe("a fox", generator=torch.Generator().manual_seed(0), output_type="latent", **call).frames
    return made


@pytest.mark.parametrize("name", PIPES)
def test_a_lora_learns_and_is_loaded(name: str, clips: Path, tmp_path: Path) -> None:
    pipe, own = PIPES[name](), size(name)
    lora = Lora(size=own, trained_frames=own.frames, rank=4, validation=2, samples=1)
    course = Course(steps=8, rate=0.02, warmup=0, check_every=8)
    schedule = Schedule(dense_first=0, dense_layers=())
    method = falloff.Radial(block=4)
    train_lora(pipe, clips, tmp_path, method, lora, course, schedule=schedule, call=CALL)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    before, after = (entry["validation"] for entry in entries if "validation" in entry)
    assert after < before
    assert len(list((tmp_path / "samples").glob("*.mp4"))) == 2
    fresh = PIPES[name]()
    recipe = falloff.Recipe.load(tmp_path / RECIPE)
    with falloff.using(pipe, recipe), falloff.using(fresh, recipe):
        tuned, plain = latents(pipe, own), latents(fresh, own)
        with loaded(fresh, tmp_path):
            torch.testing.assert_close(latents(fresh, own), tuned)
        assert torch.equal(latents(fresh, own), plain)
    assert not torch.allclose(tuned, plain, atol=1e-3)


def test_where_the_pipeline_loads_no_lora_its_transformer_does(clips: Path, tmp_path: Path) -> None:
    pipe = hunyuan_video15()
    settings = {"schedule": Schedule(dense_first=0, dense_layers=()), "call": CALL}
    own = size("HunyuanVideo 1.5")
    lora = Lora(size=own, trained_frames=9, rank=4, validation=0, samples=0)
    train_lora(pipe, clips, tmp_path, falloff.Radial(block=4), lora, Course(steps=1, rate=0.05, warmup=0), **settings)
    assert all(key.startswith("transformer.transformer_blocks.") for key in load_file(tmp_path / WEIGHTS))
    fresh = hunyuan_video15()
    fresh.transformer.load_lora_adapter(str(tmp_path), weight_name=WEIGHTS)
    assert torch.equal(latents(fresh, own), latents(pipe, own))
