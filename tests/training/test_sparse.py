"""Fine-tuning to a method that learns: what is trained, what is aimed at, how sparsity rises, what is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import falloff
from falloff import Recipe, Schedule
from falloff.training import Course, Size, Sparse, TrainingError, train_lora, train_sparse
from falloff.training.adapter import RECIPE, WEIGHTS
from falloff.training.lora import Lora
from falloff.training.noising import FIRST
from falloff.training.sparse import BRANCHES, eased

SIZE = Size(frames=9, height=32, width=32)
SPARSE = Sparse(size=SIZE, rank=4, validation=2, samples=0)
COURSE = Course(steps=4, rate=0.02, warmup=0, save_every=2, check_every=2)
CALL = {"num_inference_steps": 3, "max_sequence_length": 8, "guidance_scale": 2.0}
METHOD = falloff.SLA(density=0.4, q_block=4, kv_block=4)
NOTHING_DENSE = Schedule(dense_first=0, dense_layers=())


def tune(
    pipe, clips: Path, output: Path, sparse: Sparse = SPARSE, course: Course = COURSE, method=METHOD, **more
) -> Recipe:
    return train_sparse(pipe, clips, output, method, sparse, course, schedule=NOTHING_DENSE, call=CALL, **more)


def entries(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in found]


def made(pipe, branches: Path | None) -> np.ndarray:
    call = {**CALL, "num_frames": SIZE.frames, "height": SIZE.height, "width": SIZE.width, "output_type": "latent"}
    with falloff.using(pipe, METHOD, schedule=NOTHING_DENSE):
        if branches is not None:
            falloff.load_branches(pipe, branches)
        return np.asarray(pipe("a fox", generator=torch.Generator().manual_seed(0), **call).frames)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def test_branches_and_lora_come_closer_to_the_dense_model(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    course = replace(COURSE, steps=30, rate=3e-3, check_every=30)
    before = made(pipe, None)
    recipe = tune(pipe, clips, tmp_path, course=course, cache=cache)
    first, last = (entry["validation"] for entry in entries(tmp_path) if "validation" in entry)
    assert last < 0.94 * first
    trained = made(pipe, tmp_path / BRANCHES)
    assert np.abs(trained - before).max() > 1e-3
    pipe.unload_lora_weights()
    pipe.load_lora_weights(tmp_path)
    np.testing.assert_allclose(made(pipe, tmp_path / BRANCHES), trained, atol=1e-5)
    assert Recipe.load(tmp_path / RECIPE) == recipe
    with falloff.using(pipe, Recipe.load(tmp_path / RECIPE)):
        learned = falloff.branches(pipe)["0"].state_dict()
    assert all(torch.equal(tensor, load_file(tmp_path / BRANCHES)[f"0.{name}"]) for name, tensor in learned.items())
    assert recipe.method == METHOD


def test_the_aim_is_the_dense_velocity_without_the_lora(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    """With all blocks on and a blank LoRA student and teacher are one, and the loss is nothing."""
    whole = falloff.SLA(density=1.0, negligible=0, q_block=4, kv_block=4)
    tune(pipe, clips, tmp_path, course=replace(COURSE, steps=1), method=whole, cache=cache, kernel="reference")
    assert entries(tmp_path)[0]["validation"] < 1e-9
    assert entries(tmp_path)[1]["loss"] < 1e-9


def test_the_full_model_is_tuned_towards_its_former_self(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    course = replace(COURSE, steps=30, rate=5e-4, check_every=30)
    tune(pipe, clips, tmp_path, replace(SPARSE, backbone="full"), course, cache=cache)
    first, last = (entry["validation"] for entry in entries(tmp_path) if "validation" in entry)
    assert last < 0.94 * first
    assert not torch.equal(pipe.transformer.blocks[0].ffn.net[2].weight, before["blocks.0.ffn.net.2.weight"])
    again = WanTransformer3DModel.from_pretrained(tmp_path / FIRST)
    for name, parameter in again.named_parameters():
        assert torch.equal(parameter, pipe.transformer.get_parameter(name))
    assert not (tmp_path / WEIGHTS).exists()


def test_branches_alone_leave_the_model(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    tune(pipe, clips, tmp_path, replace(SPARSE, backbone="none", aim="flow"), cache=cache)
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    assert np.abs(made(pipe, tmp_path / BRANCHES) - made(pipe, None)).max() > 1e-6


@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_goes_on_where_it_was(pipe, clips: Path, tmp_path: Path, cache: Path, checkpointing: bool) -> None:
    class Stopped(Exception):
        pass

    def stop(doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == 3:
            raise Stopped

    sparse = replace(SPARSE, ramp=1, checkpointing=checkpointing)
    tune(pipe, clips, tmp_path / "whole", sparse, cache=cache)
    pipe.unload_lora_weights()
    with pytest.raises(Stopped):
        tune(pipe, clips, tmp_path / "cut", sparse, cache=cache, progress=stop)
    assert not getattr(pipe.transformer, "peft_config", {})
    tune(pipe, clips, tmp_path / "cut", sparse, cache=cache)
    assert entries(tmp_path / "cut") == entries(tmp_path / "whole")
    ours, theirs = (load_file(tmp_path / name / BRANCHES) for name in ("cut", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_sparsity_rises_with_the_ramp(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    assert [eased(falloff.VSA(sparsity=0.07), step, 50).sparsity for step in (0, 49, 50, 100, 150, 900)] == [
        0,
        0,
        0.03,
        0.06,
        0.07,
        0.07,
    ]
    assert [eased(METHOD, step, 10).density for step in (0, 10, 190, 200, 900)] == pytest.approx(
        [1, 0.97, 0.43, 0.4, 0.4]
    )
    assert eased(METHOD, 0, 0) is METHOD
    once = replace(COURSE, steps=1)
    tune(pipe, clips, tmp_path / "now", course=once, cache=cache)
    pipe.unload_lora_weights()
    tune(pipe, clips, tmp_path / "later", replace(SPARSE, ramp=5), once, cache=cache)
    now, later = (entries(tmp_path / name) for name in ("now", "later"))
    assert now[0] == later[0]  # validation is of the method's own sparsity
    assert now[1]["loss"] > 2 * later[1]["loss"]  # and the first step of the ramp has none


def test_what_cannot_be_trained_is_refused(pipe, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="radial learns nothing"):
        tune(pipe, clips, tmp_path, replace(SPARSE, backbone="none"), method=falloff.Radial())
    with pytest.raises(TrainingError, match="radial has no density or sparsity"):
        tune(pipe, clips, tmp_path, replace(SPARSE, ramp=50), method=falloff.Radial())
    with pytest.raises(TrainingError, match="sla has parameters of its own"):
        train_lora(pipe, clips, tmp_path, METHOD, Lora(size=SIZE, trained_frames=5), COURSE)
    pipe.transformer.to(torch.bfloat16)
    with pytest.raises(TrainingError, match=r"in torch.bfloat16 small steps would be lost"):
        tune(pipe, clips, tmp_path, replace(SPARSE, backbone="full"))
    for field, value in (("backbone", "half"), ("aim", "noise"), ("rank", 0), ("ramp", -1)):
        with pytest.raises(ValueError, match=f"{field} = {value!r}"):
            replace(SPARSE, **{field: value})
