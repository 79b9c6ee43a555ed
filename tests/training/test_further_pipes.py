"""Families whose text encoders are not Wan's, from clips and captions to a LoRA that is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from further_pipes import allegro, flux, hunyuan_video15, qwen_image
from peft import LoraConfig
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import falloff
from falloff import Schedule
from falloff.training import Course, Lora, Size, TrainingError, adapter, injected, train_lora
from falloff.training.adapter import RECIPE, WEIGHTS, loaded
from falloff.training.families import family_of

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")  # between a scheduler and numpy
CALL = {"num_inference_steps": 2}
PIPES: dict[str, Callable[[], Any]] = {
    "HunyuanVideo 1.5": hunyuan_video15,
    "Allegro": allegro,
    "FLUX.1": flux,
    "QwenImage": qwen_image,
}
FRAMES = {"Allegro": 8, "FLUX.1": 1, "QwenImage": 1}
HALF = falloff.SpargeAttn(q_block=4, kv_block=4)


def size(name: str) -> Size:
    frames = FRAMES.get(name, 9)
    return Size(frames=frames, height=64 if frames == 1 else 32, width=64 if frames == 1 else 32)


def latents(pipe: Any, size: Size) -> Tensor:
    call = {**CALL, **({"num_frames": size.frames} if size.frames > 1 else {})}
    noise = torch.Generator().manual_seed(0)
    out = pipe("a fox", generator=noise, output_type="latent", height=size.height, width=size.width, **call)
    made: Tensor = out.frames if size.frames > 1 else out.images
    return made


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five of 48 x 64, captions beside them."""
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(5):
        Image.new("RGB", (48, 64), (200, 40 * number, 30)).save(folder / f"{number}.{'jpg' if number % 2 else 'png'}")
        (folder / f"{number}.txt").write_text("a fox" if number % 2 else "a")
    return folder


@pytest.mark.parametrize("name", PIPES)
def test_a_lora_learns_and_is_loaded(name: str, clips: Path, pictures: Path, tmp_path: Path) -> None:
    pipe, own = PIPES[name](), size(name)
    lora = Lora(size=own, trained_frames=own.frames, rank=4, validation=2, samples=1)
    course = Course(steps=8, rate=0.02, warmup=0, check_every=8)
    schedule = Schedule(dense_first=0, dense_layers=())
    method, data = (HALF, pictures) if own.frames == 1 else (falloff.Radial(block=4), clips)
    train_lora(pipe, data, tmp_path, method, lora, course, schedule=schedule, call=CALL)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    before, after = (entry["validation"] for entry in entries if "validation" in entry)
    assert after < before
    assert len(list((tmp_path / "samples").glob("*.png" if own.frames == 1 else "*.mp4"))) == 2
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


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (Size(frames=5, height=64, width=64), "FluxPipeline makes pictures, and 5 frames are asked for; give 1"),
        (Size(frames=1, height=72, width=64), "height = 72 and width = 64 have to be multiples of 16"),
    ],
)
def test_sizes_that_are_no_pictures_are_refused(pictures: Path, tmp_path: Path, own: Size, told: str) -> None:
    lora = Lora(size=own, trained_frames=1, rank=4, validation=0, samples=0)
    with pytest.raises(TrainingError, match=told):
        train_lora(flux(), pictures, tmp_path / "out", HALF, lora, Course(steps=1), call=CALL)
    assert not (tmp_path / "out").exists()


def test_distilled_guidance_of_an_unknown_scale_is_refused() -> None:
    pipe = qwen_image()
    pipe.transformer.register_to_config(guidance_embeds=True)
    with pytest.raises(TrainingError, match="QwenImagePipeline cannot be trained: its guidance is distilled"):
        family_of(pipe)


def weights(model: Any) -> dict[str, Tensor]:
    """By names that do not tell of LoRA around a layer."""
    return {name.replace(".base_layer", ""): value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two LoRAs are what is meant
@pytest.mark.filterwarnings("ignore:Adapter falloff was active")  # and that one of them is left
@pytest.mark.parametrize("others", [[], ["style"]])
def test_an_error_takes_off_what_diffusers_cannot(others: list[str]) -> None:
    """The LoRA of ours alone, of a transformer that knows nothing of LoRA."""
    model = allegro().transformer
    for name in others:
        injected.add(model, LoraConfig(r=2, target_modules=["to_q"]), name)
    before = weights(model)
    seen: list[set[str]] = []

    def stop() -> None:
        seen.append(set(model.peft_config))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), adapter.adapted(model, 2, 0):
        stop()
    assert seen == [{*others, adapter.NAME}]
    assert list(getattr(model, "peft_config", {})) == others
    after = weights(model)
    assert set(after) == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_file_with_nothing_for_the_transformer_is_refused(tmp_path: Path) -> None:
    save_file({"text_encoder.lora_A.weight": torch.zeros(2, 2)}, tmp_path / WEIGHTS)
    with (
        pytest.raises(TrainingError, match=r"cannot load .* AllegroPipeline: .*no layer of it is named transf"),
        loaded(allegro(), tmp_path),
    ):
        pass
