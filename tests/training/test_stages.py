"""The first stage of methods that learn, layer by layer against dense attention, and the second that starts from it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import falloff
from falloff import Recipe, Schedule
from falloff.api import NotEnabledError
from falloff.training import Course, Size, Sparse, TrainingError, train_sparse
from falloff.training.adapter import RECIPE, WEIGHTS
from falloff.training.sparse import BRANCHES

SIZE = Size(frames=9, height=32, width=32)
FIRST = Sparse(size=SIZE, validation=2, samples=0, aim="output", backbone="none")
SECOND = Sparse(size=SIZE, validation=2, samples=0, rank=4)
COURSE = Course(steps=4, rate=0.02, warmup=0, save_every=2, check_every=2)
CALL = {"num_inference_steps": 3, "max_sequence_length": 8, "guidance_scale": 2.0}
SLA = falloff.SLA(density=0.4, q_block=4, kv_block=4)
SLA2 = falloff.SLA2(density=0.4, q_block=4, kv_block=4)
VSA = falloff.VSA(gate=True, tile=(1, 2, 2), sparsity=0.6)
METHODS = [SLA, SLA2, VSA]
NOTHING_DENSE = Schedule(dense_first=0, dense_layers=())


def tune(pipe, clips: Path, output: Path, sparse: Sparse = FIRST, course: Course = COURSE, method=SLA, **more):
    settings = {"schedule": NOTHING_DENSE, "call": CALL, **more}
    return train_sparse(pipe, clips, output, method, sparse, course, **settings)


def entries(folder: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in found]


def branches_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / BRANCHES)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def first(pipe, clips: Path, cache: Path, tmp_path: Path) -> Path:
    """A first stage of two steps."""
    tune(pipe, clips, tmp_path / "first", course=replace(COURSE, steps=2), cache=cache)
    return tmp_path / "first"


@pytest.mark.parametrize("method", [SLA, SLA2], ids=lambda method: method.name)
def test_every_layer_comes_closer_to_its_dense_output(
    pipe, clips: Path, tmp_path: Path, cache: Path, method: falloff.Method
) -> None:
    """By the same samples, beside a training that learns next to nothing."""
    later = []
    for name, rate in (("still", 1e-12), ("moving", 0.01)):
        course = replace(COURSE, steps=30, rate=rate, check_every=30)
        tune(pipe, clips, tmp_path / name, course=course, method=method, cache=cache)
        later.append(sum([entry["loss"] for entry in entries(tmp_path / name) if "loss" in entry][15:]))
    assert later[1] < 0.95 * later[0]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_model_is_left_alone(pipe, clips: Path, tmp_path: Path, cache: Path, method: falloff.Method) -> None:
    before = {name: p.detach().clone() for name, p in pipe.transformer.named_parameters()}
    recipe = tune(pipe, clips, tmp_path, course=replace(COURSE, steps=2), method=method, cache=cache)
    assert all(torch.equal(p, before[name]) for name, p in pipe.transformer.named_parameters())
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    with falloff.using(pipe, method, schedule=NOTHING_DENSE):
        fresh = {f"0.{name}": p for name, p in falloff.branches(pipe)["0"].named_parameters()}
    fitted = branches_of(tmp_path)
    assert not any(torch.equal(fitted[name], parameter) for name, parameter in fresh.items())
    assert Recipe.load(tmp_path / RECIPE) == recipe
    assert recipe.evidence["aim"] == "output"
    assert not (tmp_path / WEIGHTS).exists()


def test_the_router_is_trained_in_the_first_stage_alone(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    tune(pipe, clips, tmp_path / "first", method=SLA2, cache=cache)
    fitted = branches_of(tmp_path / "first")
    routers = [name for name in fitted if "router" in name]
    assert len(routers) == 4  # of queries and keys, in two layers
    assert all((fitted[name] - torch.eye(12)).abs().max() > 1e-3 for name in routers)
    tune(pipe, clips, tmp_path / "second", SECOND, method=SLA2, cache=cache, start=tmp_path / "first")
    tuned = branches_of(tmp_path / "second")
    assert all(torch.equal(tuned[name], fitted[name]) for name in routers)
    assert not torch.equal(tuned["0.0.slope"], fitted["0.0.slope"])


def test_the_second_stage_begins_where_the_first_ended(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    once, first = replace(COURSE, steps=1), tmp_path / "first"
    tune(pipe, clips, first, cache=cache)
    tune(pipe, clips, tmp_path / "longer", FIRST, once, cache=cache, start=first)
    assert entries(tmp_path / "longer")[0]["validation"] == entries(first)[-1]["validation"]
    for name, start in (("fresh", None), ("started", first), ("file", first / BRANCHES)):
        recipe = tune(pipe, clips, tmp_path / name, SECOND, once, cache=cache, start=start)
        pipe.unload_lora_weights()
    fresh, started, file = (entries(tmp_path / name) for name in ("fresh", "started", "file"))
    assert started[0]["validation"] != fresh[0]["validation"]
    assert file == started
    assert recipe.evidence["start"] == str(first / BRANCHES)


@pytest.mark.parametrize("method", [SLA, SLA2], ids=lambda method: method.name)
def test_both_stages_go_on_where_they_were(
    pipe, clips: Path, tmp_path: Path, cache: Path, method: falloff.Method
) -> None:
    class Stopped(Exception):
        pass

    def stop(doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == 3:
            raise Stopped

    start = None
    for stage, sparse in (("first", FIRST), ("second", SECOND)):
        whole, cut = tmp_path / f"{stage}-whole", tmp_path / f"{stage}-cut"
        settings = {"method": method, "cache": cache, "start": start}
        tune(pipe, clips, whole, sparse, **settings)
        pipe.unload_lora_weights()
        with pytest.raises(Stopped):
            tune(pipe, clips, cut, sparse, progress=stop, **settings)
        tune(pipe, clips, cut, sparse, **settings)
        pipe.unload_lora_weights()
        assert entries(cut) == entries(whole)
        ours, theirs = branches_of(cut), branches_of(whole)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        start = whole


def test_another_start_is_another_training(pipe, clips: Path, tmp_path: Path, cache: Path, first: Path) -> None:
    once = replace(COURSE, steps=1)
    tune(pipe, clips, tmp_path / "second", SECOND, once, cache=cache, start=first)
    pipe.unload_lora_weights()
    with pytest.raises(TrainingError, match="start: the files are others; go on with those"):
        tune(pipe, clips, tmp_path / "second", SECOND, COURSE, cache=cache)
    with safe_open(first / BRANCHES, framework="pt") as file:
        metadata = file.metadata()
    again = tmp_path / "again.safetensors"
    save_file(branches_of(first), again, metadata={**metadata, "written": "again"})
    tune(pipe, clips, tmp_path / "second", SECOND, COURSE, cache=cache, start=again)  # the same numbers are the same


def test_levels_of_dense_steps_are_not_drawn(pipe, clips: Path, tmp_path: Path, cache: Path) -> None:
    """Nothing could be learned from them; the first of three steps is most of the levels."""
    schedule = Schedule(dense_first=1, dense_layers=(0,))
    for aim in ("output", "velocity"):
        sparse = replace(FIRST, aim=aim)
        tune(pipe, clips, tmp_path / aim, sparse, replace(COURSE, steps=12), cache=cache, schedule=schedule)
        losses = [entry["loss"] for entry in entries(tmp_path / aim) if "loss" in entry]
        assert len(losses) == 12
        assert all(loss > 0 for loss in losses)
        assert {name.split(".")[1] for name in branches_of(tmp_path / aim)} == {"1"}


def test_what_cannot_be_fitted_is_refused(pipe, clips: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backbone = 'lora' would change the model meanwhile; set backbone = 'none'"):
        replace(FIRST, backbone="lora")
    with pytest.raises(TrainingError, match="radial learns nothing"):
        tune(pipe, clips, tmp_path / "out", method=falloff.Radial())
    for dense, told in (
        (Schedule(dense_first=0, dense_layers=(0, 1)), "all 2 layers"),
        (Schedule(dense_first=3, dense_layers=()), "all 3 steps"),
    ):
        with pytest.raises(TrainingError, match=f"{told}.* dense, so that sla has nothing to do"):
            tune(pipe, clips, tmp_path / "out", schedule=dense)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_started_from_is_refused(pipe, clips: Path, tmp_path: Path, cache: Path, first: Path) -> None:
    def refused(told: str, start: Path, method: falloff.Method = SLA, sparse: Sparse = SECOND) -> None:
        with pytest.raises(TrainingError, match=told):
            tune(pipe, clips, tmp_path / "second", sparse, method=method, cache=cache, start=start)
        assert not (tmp_path / "second").exists()
        with pytest.raises(NotEnabledError):
            falloff.disable(pipe)

    refused("there is nothing to start from at", tmp_path / "nowhere")
    refused("there is nothing to start from at", clips)
    refused("is of the method 'sla', enabled is 'sla2'", first, SLA2)
    refused("was trained with .*'marginal'.*enable the file's settings", first, replace(SLA, linear_over="all"))
    refused("radial learns nothing as it is set that could start", first, falloff.Radial())
    refused("holds no trained parameters|no safetensors file", clips / "0.mp4")
    with pytest.raises(TrainingError, match="cannot be both start and output"):
        tune(pipe, clips, first, SECOND, cache=cache, start=first)
    (first / WEIGHTS).write_bytes(b"")
    refused(f"was trained together with {WEIGHTS}", first)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((first / BRANCHES).read_bytes()[:100])
    refused("cannot start as asked: .*cut.safetensors is no safetensors file", cut)
