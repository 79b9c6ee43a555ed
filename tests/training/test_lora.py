"""A LoRA trained under sparse attention: what it changes, what it leaves, how it is loaded, and how it goes on."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiny_clips import write_clip

import falloff
from falloff import Recipe, Schedule
from falloff.api import NotEnabledError
from falloff.training import Course, Lora, Size, TrainingError, studio, train_lora
from falloff.training.adapter import NAME, RECIPE, WEIGHTS, loaded, projections

SIZE = Size(frames=9, height=32, width=32)
LORA = Lora(size=SIZE, trained_frames=5, rank=4, validation=2, samples=0)
COURSE = Course(steps=6, rate=0.05, warmup=0, save_every=2, check_every=3)
CALL = {"num_inference_steps": 3, "max_sequence_length": 8, "guidance_scale": 2.0}
METHOD = falloff.Radial(block=4)
SCHEDULE = Schedule(dense_first=1, dense_layers=())


def tune(pipe, clips: Path, output: Path, lora: Lora = LORA, course: Course = COURSE, method=METHOD, **more) -> Recipe:
    return train_lora(pipe, clips, output, method, lora, course, schedule=SCHEDULE, call=CALL, **more)


def made(pipe) -> np.ndarray:
    call = {**CALL, "num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}
    with falloff.using(pipe, METHOD, schedule=SCHEDULE):
        return np.asarray(
            pipe("a fox", generator=torch.Generator().manual_seed(0), output_type="latent", **call).frames
        )


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [entry.get("loss", entry.get("validation")) for entry in entries]


@pytest.fixture(scope="module")
def trained(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An output folder, and a video of the pipeline that was trained."""
    from worded import pipeline

    pipe, output = pipeline(), tmp_path_factory.mktemp("lora")
    pipe.set_progress_bar_config(disable=True)
    tune(pipe, clips, output, replace(LORA, samples=1))
    return output, made(pipe)


def test_projections_are_those_of_self_attention(pipe) -> None:
    found = projections(pipe.transformer)
    assert found[:4] == [f"blocks.0.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
    assert len(found) == 8
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), "other")
    assert projections(pipe.transformer) == found


def test_a_training_writes_what_a_pipeline_loads(pipe, trained: tuple[Path, np.ndarray]) -> None:
    output, video = trained
    before = made(pipe)
    pipe.load_lora_weights(output)
    np.testing.assert_allclose(made(pipe), video, atol=1e-5)
    assert np.abs(video - before).max() > 1e-3
    names = set(load_file(output / WEIGHTS))
    assert "transformer.blocks.1.attn1.to_out.0.lora_B.weight" in names
    assert len(names) == 16
    assert sorted(file.name for file in (output / "samples").iterdir()) == [
        f"step-{step:06d}-0.mp4" for step in (0, 3, 6)
    ]


def test_the_recipe_is_the_inference_that_was_trained_for(pipe, trained: tuple[Path, np.ndarray]) -> None:
    recipe = Recipe.load(trained[0] / RECIPE)
    assert (recipe.method, recipe.schedule) == (METHOD, SCHEDULE)
    assert recipe.evidence["frames"] == 9
    with falloff.using(pipe, recipe):
        pass


def test_nothing_but_the_lora_changes(pipe, clips: Path, tmp_path: Path) -> None:
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    flags = {p.requires_grad for p in pipe.transformer.parameters()}
    tune(pipe, clips, tmp_path, course=replace(COURSE, steps=2))
    base = {name.replace(".base_layer", ""): p for name, p in pipe.transformer.named_parameters() if NAME not in name}
    assert all(torch.equal(base[name], tensor) for name, tensor in before.items())
    assert {p.requires_grad for p in base.values()} == flags
    with pytest.raises(NotEnabledError):
        falloff.report(pipe)


def test_it_learns(pipe, clips: Path, tmp_path: Path) -> None:
    tune(pipe, clips, tmp_path, course=replace(COURSE, steps=40, rate=0.02, check_every=40, batch=2))
    first, *_, last = losses(tmp_path)
    assert last < 0.97 * first


def test_it_trains_under_the_method_and_not_densely(pipe, clips: Path, tmp_path: Path) -> None:
    tune(pipe, clips, tmp_path / "sparse", course=replace(COURSE, steps=1), cache=tmp_path / "cache")
    pipe.unload_lora_weights()
    tune(
        pipe,
        clips,
        tmp_path / "dense",
        course=replace(COURSE, steps=1),
        method=falloff.Full(),
        cache=tmp_path / "cache",
    )
    assert losses(tmp_path / "sparse")[0] != pytest.approx(losses(tmp_path / "dense")[0], rel=1e-5)


@pytest.mark.parametrize(
    "method", [METHOD, falloff.SVG2(q_clusters=4, k_clusters=6, mass=0.5)], ids=["static", "dynamic"]
)
def test_checkpointing_changes_no_gradient(pipe, clips: Path, tmp_path: Path, method) -> None:
    course, cache = replace(COURSE, steps=3), tmp_path / "cache"
    tune(pipe, clips, tmp_path / "plain", course=course, method=method, cache=cache)
    pipe.unload_lora_weights()
    tune(pipe, clips, tmp_path / "again", replace(LORA, checkpointing=True), course, method, cache=cache)
    assert not pipe.transformer.is_gradient_checkpointing
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # norms keep their weights in float32
def test_half_precision_computes_close_to_single(pipe, clips: Path, tmp_path: Path) -> None:
    course, cache = replace(COURSE, steps=2), tmp_path / "cache"
    tune(pipe, clips, tmp_path / "single", course=course, cache=cache)
    pipe.unload_lora_weights()
    tune(pipe, clips, tmp_path / "half", replace(LORA, precision="bf16"), course, cache=cache)
    assert losses(tmp_path / "half") != losses(tmp_path / "single")
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "single"), rel=0.01)


def test_a_killed_training_goes_on_bit_for_bit(
    pipe, clips: Path, tmp_path: Path, trained: tuple[Path, np.ndarray]
) -> None:
    code = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        f"import torch; torch.set_num_threads({torch.get_num_threads()})\n"
        "import test_lora; from pathlib import Path\n"
        f"test_lora.killed(Path({str(clips)!r}), Path({str(tmp_path)!r}), Path({str(trained[0] / 'cache')!r}))"
    )
    process = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONWARNINGS": "ignore"}, check=False)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / WEIGHTS).exists()
    assert len(losses(tmp_path)) > 4
    tune(pipe, clips, tmp_path, replace(LORA, samples=1), cache=trained[0] / "cache")
    assert losses(tmp_path) == losses(trained[0])
    ours, theirs = load_file(tmp_path / WEIGHTS), load_file(trained[0] / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def killed(clips: Path, output: Path, cache: Path) -> None:
    """Train until step 5, which is past the last state, and die there."""
    from worded import pipeline

    def die(doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    pipe = pipeline()
    pipe.set_progress_bar_config(disable=True)
    tune(pipe, clips, output, replace(LORA, samples=1), cache=cache, progress=die)


def test_other_settings_do_not_go_on(pipe, clips: Path, trained: tuple[Path, np.ndarray]) -> None:
    with pytest.raises(TrainingError, match="rank was 4 and is now 8"):
        tune(pipe, clips, trained[0], replace(LORA, samples=1, rank=8))
    assert isinstance(pipe.transformer.blocks[0].attn1.to_q, torch.nn.Linear)  # the LoRA is off again


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # two LoRAs are what is meant
def test_it_goes_together_with_a_style(pipe, clips: Path, tmp_path: Path, trained: tuple[Path, np.ndarray]) -> None:
    """Two LoRAs at once are their deltas added."""
    generator = torch.Generator().manual_seed(1)
    style = {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        for name, tensor in load_file(trained[0] / WEIGHTS).items()
    }
    save_file(style, tmp_path / "style.safetensors")
    weight = pipe.transformer.blocks[1].attn1.to_v.weight.detach().clone()
    pipe.load_lora_weights(trained[0], adapter_name="long")
    pipe.load_lora_weights(tmp_path, weight_name="style.safetensors", adapter_name="style")
    pipe.set_adapters(["long", "style"])
    pipe.fuse_lora(adapter_names=["long", "style"])
    expected = weight
    for part in (load_file(trained[0] / WEIGHTS), style):
        name = "transformer.blocks.1.attn1.to_v.lora_"
        expected = expected + part[f"{name}B.weight"] @ part[f"{name}A.weight"]
    fused = pipe.transformer.blocks[1].attn1.to_v.base_layer.weight
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=1e-4)


def test_riflex_is_trained_and_loaded(pipe, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_clip(tmp_path / f"{name}.mp4", frames=29)
        (tmp_path / f"{name}.txt").write_text("a")
    lora, once = replace(LORA, size=replace(SIZE, frames=29)), replace(COURSE, steps=1)
    for rope in ("plain", "riflex"):
        cos = pipe.transformer.rope.freqs_cos.clone()
        tune(pipe, tmp_path, tmp_path / rope, replace(lora, rope=rope), once, cache=tmp_path / "cache")
        pipe.unload_lora_weights()
        assert torch.equal(pipe.transformer.rope.freqs_cos, cos)
        with loaded(pipe, tmp_path / rope):
            assert NAME in pipe.transformer.peft_config
            assert torch.equal(pipe.transformer.rope.freqs_cos, cos) == (rope == "plain")
        assert torch.equal(pipe.transformer.rope.freqs_cos, cos)
        assert not getattr(pipe.transformer, "peft_config", {})
    assert losses(tmp_path / "riflex")[0] != pytest.approx(losses(tmp_path / "plain")[0], rel=1e-6)


def test_a_lora_of_another_model_is_refused(pipe, tmp_path: Path, trained: tuple[Path, np.ndarray]) -> None:
    content = load_file(trained[0] / WEIGHTS)
    deeper = {name.replace("blocks.1.", "blocks.7."): tensor for name, tensor in content.items()}
    wider = {name: torch.cat([tensor, tensor], dim=1) for name, tensor in content.items()}
    for kind, part in ((deeper, "has no layer blocks.7.attn1"), (wider, "has 48 channels")):
        save_file(kind, tmp_path / "other.safetensors")
        with (
            pytest.raises(TrainingError, match=f"LoRA of another model.*{part}"),
            loaded(pipe, tmp_path / "other.safetensors"),
        ):
            pass
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="no readable"), loaded(pipe, tmp_path / "broken.safetensors"):
        pass
    with pytest.raises(TrainingError, match="there is no LoRA at"), loaded(pipe, tmp_path / "none"):
        pass


def test_nothing_is_written_for_data_that_cannot_be_used(pipe, tmp_path: Path) -> None:
    folder, output = tmp_path / "clips", tmp_path / "out"
    folder.mkdir()
    write_clip(folder / "a.mp4", frames=5)
    (folder / "a.txt").write_text("a")
    with pytest.raises(TrainingError, match="has 5 frames"):
        tune(pipe, folder, output)
    write_clip(folder / "a.mp4", frames=9)
    with pytest.raises(TrainingError, match="2 clips are to be kept for validation, and there are 1"):
        tune(pipe, folder, output)
    assert not output.exists()


def test_a_launch_that_is_not_served_is_refused(
    pipe, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every process would train all of the model, which is not what was asked for."""
    started = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    monkeypatch.setattr(studio, "Accelerator", lambda **settings: started)
    with pytest.raises(TrainingError, match=r"started with DEEPSPEED; .*--multi_gpu, .*--use_fsdp"):
        tune(pipe, clips, tmp_path)


def test_one_process_is_no_team(pipe, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="ulysses = 2 makes no even teams of 1 processes; start a multiple of 2"):
        tune(pipe, clips, tmp_path / "out", replace(LORA, ulysses=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [("rank", 0), ("ulysses", 0), ("uncaptioned", 1.5), ("samples", 9), ("rope", "yarn"), ("precision", "fp4")],
)
def test_settings_are_checked(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value!r}"):
        replace(LORA, **{field: value})
