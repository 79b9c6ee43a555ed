"""Trainings whose processes share the model out: the same outcome as of processes that have all of it each."""

import json
import re
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sharded
import torch
from families import FAMILIES
from safetensors.torch import load_file

from falloff.evaluation import video
from falloff.training import TrainingError, ulysses
from falloff.training.adapter import RECIPE, SECOND_WEIGHTS, WEIGHTS, loaded
from falloff.training.sharding import in_step
from falloff.training.sparse import BRANCHES


@pytest.fixture(scope="module")
def folder(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left; they start once, since that takes longer than all they do."""
    made = tmp_path_factory.mktemp("sharded")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(sharded.work, args=(port, str(clips), str(made)), nprocs=sharded.WORLD)
    return made


def noted(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


def entries(output: Path) -> list[dict[str, float]]:
    found = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in found]


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("lora", [WEIGHTS]),
        ("half", [WEIGHTS]),
        ("experts", [WEIGHTS, SECOND_WEIGHTS]),
        ("tokens", [WEIGHTS]),
        ("velocity", [WEIGHTS, BRANCHES]),
        ("output", [BRANCHES]),
    ],
)
def test_shared_out_a_model_is_trained_as_if_every_process_had_all_of_it(
    folder: Path, name: str, files: list[str]
) -> None:
    whole, shared = folder / "whole" / name, folder / "shared" / name
    for file in files:
        ours, theirs = load_file(shared / file), load_file(whole / file)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():  # of two experts, processes take other samples than without
            torch.testing.assert_close(ours[key], tensor, rtol=0, atol=1e-6 if name == "experts" else 0)
    for ours, theirs in zip(entries(shared), entries(whole), strict=True):
        assert ours == (pytest.approx(theirs, rel=1e-5) if name == "experts" else theirs)
    assert (shared / RECIPE).read_text().replace("/shared/", "/whole/") == (whole / RECIPE).read_text()


def test_the_samples_that_all_make_are_those_that_one_makes(folder: Path) -> None:
    name = "samples/step-000004-0.mp4"
    for training in ("lora", "experts"):
        ours, theirs = (video.read(folder / kind / training / name) for kind in ("shared", "whole"))
        assert abs(ours.astype(int) - theirs).max() <= 1


def test_a_process_holds_its_share_and_nothing_of_the_rest(folder: Path) -> None:
    for rank in range(2):
        found = noted(folder, rank)["shares"]
        assert found["share"] == pytest.approx(0.5, abs=0.02)
        assert found["freed"]
        assert "of this WanTransformer3DModel is a DTensor" in found["again"]


def test_a_cut_training_goes_on_bit_for_bit_with_all_of_the_model_or_a_share(folder: Path) -> None:
    ours, theirs = (load_file(folder / "shared" / name / WEIGHTS) for name in ("cut", "lora"))
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    assert entries(folder / "shared" / "cut") == entries(folder / "shared" / "lora")


def test_the_lora_is_loaded_by_a_whole_model(folder: Path, pipe: Any) -> None:
    with loaded(pipe, folder / "shared" / "lora"):
        assert any("lora" in name for name, _ in pipe.transformer.named_parameters())


def test_sharing_the_tokens_of_samples_changes_nothing_but_rounding(folder: Path) -> None:
    shared, alone = folder / "whole" / "tokens", folder / "whole" / "lora"
    ours, theirs = (load_file(output / WEIGHTS) for output in (shared, alone))
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, atol=1e-6, rtol=1e-4)
    for our, their in zip(entries(shared), entries(alone), strict=True):
        assert our == pytest.approx(their, rel=1e-4)
    name = "samples/step-000004-0.mp4"
    difference = abs(video.read(shared / name).astype(int) - video.read(alone / name))
    assert difference.mean() < 0.1  # one level that rounds the other way may be two when the codec is done


def test_a_process_runs_the_layers_on_its_share_of_the_tokens(folder: Path) -> None:
    for rank in range(2):
        assert noted(folder, rank)["tokens"] == {"seen": [3 * 2 * 2 // 2], "left": []}


@pytest.mark.parametrize("family", sharded.TRAINED)
def test_gradients_of_every_family_pass_through_shared_layers(folder: Path, family: str) -> None:
    for rank in range(2):
        assert noted(folder, rank)["gradients"][family] < 1e-5


def test_tokens_of_models_that_diffusers_does_not_share_are_refused() -> None:
    two = SimpleNamespace(num_processes=2)
    with pytest.raises(TrainingError, match="tokens of MochiTransformer3DModel cannot be shared in training"):
        ulysses.check([FAMILIES["Mochi"].build()], 2, two)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("FSDP_VERSION", "FSDP 1 is not served; add --fsdp_version 2"),
        ("FSDP_OFFLOAD_PARAMS", "leave --fsdp_offload_params out"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "give falloff's own --checkpointing in place"),
        ("full", "all weights are to be trained, and what processes share out .* stays frozen"),
        ("odd", r"3 x 1 x 1 tokens have no even shares for ulysses = 2 processes"),
        ("heads", r"3 heads have no even shares for ulysses = 2 processes"),
        ("unlike", "processes hold other weights of text_encoder and transformer than the first"),
        ("quantized", r"proj_out\.weight of this WanTransformer3DModel is a Parameter of torch\.int8"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(folder: Path, name: str, words: str) -> None:
    for rank in range(2):
        told = noted(folder, rank)["refusals"][name]
        assert re.search(words, told), told


def test_processes_run_one_model_at_a_time() -> None:
    samples, models = range(7), ["b", "a", "a", "b", "a", "b", "b"]
    taken = [in_step(SimpleNamespace(process_index=process, num_processes=3), samples, models) for process in range(3)]
    for together in zip(*taken, strict=True):
        assert len({models[sample] for sample, _ in together}) == 1
    assert sorted(sample for own in taken for sample, counts in own if counts) == list(samples)
