"""Two transformers that share the noise levels (Wan 2.2 A14B): each has a LoRA of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from worded_pipes import BOUNDARY, experts

import falloff
from falloff import Recipe, Schedule
from falloff.training import Course, Lora, Size, Sparse, TrainingError, train_lora, train_sparse
from falloff.training.adapter import RECIPE, SECOND_WEIGHTS, WEIGHTS, loaded
from falloff.training.families import family_of
from falloff.training.noising import FIRST, SECOND, Flow, noising_of
from falloff.training.sparse import BRANCHES

SIZE = Size(frames=9, height=32, width=32)
LORA = Lora(size=SIZE, trained_frames=5, rank=4, validation=2, samples=0)
COURSE = Course(steps=6, rate=0.05, warmup=0, save_every=2, check_every=6)
CALL = {"num_inference_steps": 4, "max_sequence_length": 8, "guidance_scale": 2.0}
METHOD = falloff.Radial(block=4)
SCHEDULE = Schedule(dense_first=1, dense_layers=())


@pytest.fixture
def pipe() -> Any:
    return experts()


def tune(pipe: Any, clips: Path, output: Path, lora: Lora = LORA, course: Course = COURSE, **more: Any) -> Recipe:
    return train_lora(pipe, clips, output, METHOD, lora, course, schedule=SCHEDULE, call=CALL, **more)


def made(pipe: Any) -> np.ndarray:
    call = {**CALL, "num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width}
    with falloff.using(pipe, METHOD, schedule=SCHEDULE):
        generator = torch.Generator().manual_seed(0)
        return np.asarray(pipe("a fox", generator=generator, output_type="latent", **call).frames)


def entries(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in found]


@pytest.fixture(scope="module")
def trained(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """An output folder, and a video of the pipeline that was trained."""
    pipe, output = experts(), tmp_path_factory.mktemp("experts")
    tune(pipe, clips, output)
    return output, made(pipe)


def test_a_level_is_the_lesson_of_the_expert_that_the_pipeline_has_at_work(pipe: Any) -> None:
    ran = []
    for name in (FIRST, SECOND):
        getattr(pipe, name).register_forward_pre_hook(lambda module, args, name=name: ran.append(name))
    size = {"num_frames": 9, "height": 32, "width": 32}
    pipe("a fox", num_inference_steps=12, max_sequence_length=8, guidance_scale=1.0, output_type="latent", **size)
    noising = noising_of(pipe, family_of(pipe), 12, size)
    assert [noising.expert(level) for level in noising.levels] == ran
    assert set(ran) == {FIRST, SECOND}
    assert noising.expert(BOUNDARY) == FIRST
    assert noising.ranges == {FIRST: (BOUNDARY, 1.0), SECOND: (0.0, BOUNDARY)}
    assert Flow(shift=1.0, levels=(1.0,)).ranges == {FIRST: (0.0, 1.0)}


def test_the_pipeline_loads_both_by_its_own_loader(pipe: Any, trained: tuple[Path, np.ndarray]) -> None:
    output, video = trained
    before = made(pipe)
    pipe.load_lora_weights(output)
    half = made(pipe)
    pipe.load_lora_weights(output, weight_name=SECOND_WEIGHTS, load_into_transformer_2=True)
    np.testing.assert_allclose(made(pipe), video, atol=1e-5)
    for other in (before, half):
        assert np.abs(video - other).max() > 1e-3
    pipe.unload_lora_weights()
    with loaded(pipe, output):
        np.testing.assert_allclose(made(pipe), video, atol=1e-5)
    np.testing.assert_allclose(made(pipe), before, atol=1e-5)


def test_the_recipe_is_for_both(pipe: Any, trained: tuple[Path, np.ndarray]) -> None:
    recipe = Recipe.load(trained[0] / RECIPE)
    with falloff.using(pipe, recipe):
        assert recipe.method == METHOD


def test_each_is_validated_at_levels_of_its_own(trained: tuple[Path, np.ndarray]) -> None:
    first = entries(trained[0])[0]
    own = [first[f"validation {name}"] for name in (FIRST, SECOND)]
    assert own[0] != own[1]
    assert min(own) > 1  # as a model that knows nothing has it
    assert first["validation"] == pytest.approx(sum(own) / 2)


def test_a_step_trains_the_expert_of_its_noise_level_alone(pipe: Any, clips: Path, tmp_path: Path) -> None:
    tune(pipe, clips, tmp_path, course=replace(COURSE, steps=1))
    moved = [
        any(tensor.any() for name, tensor in load_file(tmp_path / file).items() if "lora_B" in name)
        for file in (WEIGHTS, SECOND_WEIGHTS)
    ]
    assert sorted(moved) == [False, True]


def test_a_cut_training_goes_on_bit_for_bit(
    pipe: Any, clips: Path, tmp_path: Path, trained: tuple[Path, np.ndarray]
) -> None:
    class Stopped(Exception):
        pass

    def stop(doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == 5:
            raise Stopped

    with pytest.raises(Stopped):
        tune(pipe, clips, tmp_path, cache=trained[0] / "cache", progress=stop)
    assert not any("falloff" in getattr(model, "peft_config", {}) for model in (pipe.transformer, pipe.transformer_2))
    tune(pipe, clips, tmp_path, cache=trained[0] / "cache")
    assert entries(tmp_path) == entries(trained[0])
    for file in (WEIGHTS, SECOND_WEIGHTS):
        ours, theirs = load_file(tmp_path / file), load_file(trained[0] / file)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_positions_are_lowered_in_both(pipe: Any, tmp_path: Path, trained: tuple[Path, np.ndarray]) -> None:
    folder = tmp_path / "lora"
    shutil.copytree(trained[0], folder, ignore=shutil.ignore_patterns("cache"))
    recipe = Recipe.load(folder / RECIPE)
    positions = {"rope": "riflex", "trained_grid_frames": 2, "grid_frames": 8}
    replace(recipe, evidence={**recipe.evidence, **positions}).save(folder / RECIPE)
    before = [model.rope.freqs_cos.clone() for model in (pipe.transformer, pipe.transformer_2)]
    with loaded(pipe, folder):
        after = [model.rope.freqs_cos for model in (pipe.transformer, pipe.transformer_2)]
        assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("backbone", ["lora", "full", "none"])
def test_what_a_method_learns_is_learned_for_both(pipe: Any, clips: Path, tmp_path: Path, backbone: str) -> None:
    method = falloff.SLA(density=0.4, q_block=4, kv_block=4)
    sparse = Sparse(size=SIZE, validation=1, samples=0, rank=2, backbone=backbone)
    course = replace(COURSE, steps=1, batch=8, rate=0.02)
    dense = Schedule(dense_first=0, dense_layers=())
    recipe = train_sparse(pipe, clips, tmp_path, method, sparse, course, schedule=dense, call=CALL)
    with falloff.using(experts(), method, schedule=dense) as fresh:
        began = {name: p.clone() for name, p in falloff.branches(fresh).named_parameters()}
    learned = load_file(tmp_path / BRANCHES)
    assert {name.split(".")[0] for name in learned} == {"0", "1"}
    assert not any(torch.equal(learned[name], parameter) for name, parameter in began.items())
    assert {(tmp_path / file).exists() for file in (WEIGHTS, SECOND_WEIGHTS)} == {backbone == "lora"}
    assert {(tmp_path / name).is_dir() for name in (FIRST, SECOND)} == {backbone == "full"}
    with falloff.using(experts(), replace(recipe, branches=str(tmp_path / BRANCHES))) as again:
        loaded_ones = dict(falloff.branches(again).named_parameters())
    assert all(torch.equal(loaded_ones[name], tensor) for name, tensor in learned.items())


def test_what_does_not_fit_is_refused(pipe: Any, trained: tuple[Path, np.ndarray]) -> None:
    from worded import pipeline

    with pytest.raises(TrainingError, match="is for a second transformer"), loaded(pipeline(), trained[0]):
        pass
    pipe.register_modules(transformer_2=None)
    with pytest.raises(TrainingError, match=r"boundary_ratio is 0\.75 and it has no transformer_2"):
        family_of(pipe)
