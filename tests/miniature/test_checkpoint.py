"""The shipped checkpoint: loads without a warning, and has the promised geometry and size."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from safetensors.torch import load_file

from falloff import miniature
from falloff.miniature.checkpoint import call_arguments, load_model, save


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    pipe = WanPipeline.from_pretrained(miniature.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_is_small() -> None:
    assert sum(f.stat().st_size for f in miniature.path().rglob("*") if f.is_file()) <= 16 * 2**20


def test_names_no_path_of_the_machine_it_was_made_on() -> None:
    for file in miniature.path().rglob("*.json"):
        assert "_name_or_path" not in file.read_text()


def test_default_call_has_thousands_of_tokens(pipe: WanPipeline) -> None:
    call = json.loads((miniature.path() / "generation.json").read_text())
    frames = 1 + (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal
    side = pipe.vae_scale_factor_spatial
    assert frames * (call["height"] // side) * (call["width"] // side) >= 4000


def test_training_can_go_on_from_the_shipped_weights(tmp_path: Path) -> None:
    model = load_model(miniature.path())
    assert model.training
    assert next(model.parameters()).dtype == torch.float32
    vae = AutoencoderKLWan.from_pretrained(miniature.path() / "vae", dtype=torch.float32)
    save(vae, model, tmp_path / "again")
    for part in ("transformer", "text_encoder", "vae"):
        for file in (miniature.path() / part).glob("*.safetensors"):
            again, shipped = load_file(tmp_path / "again" / part / file.name), load_file(file)
            assert all(torch.equal(again[name], shipped[name].to(again[name].dtype)) for name in shipped)


def test_loads_without_a_dtype() -> None:
    assert isinstance(WanPipeline.from_pretrained(miniature.path()), WanPipeline)


def test_generates_the_same_video_under_a_seed(pipe: WanPipeline) -> None:
    call = call_arguments(miniature.path()) | {"num_frames": 5, "num_inference_steps": 2}
    videos = [
        pipe(
            prompt="a red 3 moving right",
            generator=torch.Generator().manual_seed(0),
            output_type="np",
            **call,
        ).frames[0]
        for _ in range(2)
    ]
    assert videos[0].shape == (5, 128, 128, 3)
    assert np.array_equal(videos[0], videos[1])


def test_path_is_a_folder_in_the_package() -> None:
    assert miniature.path().is_dir()
    assert isinstance(miniature.path(), Path)
