"""Training by two processes through Accelerate."""

import json
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import together
import torch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left; they start once, since that takes longer than all they do."""
    made = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(together.work, args=(port, str(made)), nprocs=together.WORLD)
    return made


def weights(folder: Path, rank: int, name: str) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"{rank}.pt", weights_only=True)[name]


def told(folder: Path, rank: int) -> dict[str, list[str]]:
    return json.loads((folder / f"{rank}.json").read_text())


def test_both_have_the_weights_of_one_process_with_the_whole_batch(folder: Path, tmp_path: Path) -> None:
    alone = together.trained(tmp_path, 3).state_dict()
    untrained = together.model().state_dict()
    first, second = (weights(folder, rank, "plain") for rank in range(2))
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], weight, rtol=0, atol=1e-9)
    assert not torch.equal(alone["head.weight"], untrained["head.weight"])


def test_an_interrupted_training_of_both_ends_bit_for_bit_as_if_it_were_not(folder: Path) -> None:
    whole, resumed = (weights(folder, 1, name) for name in ("dropout", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_first_writes_alone(folder: Path) -> None:
    assert told(folder, 0)["wrote"] == ["plain/decoder.pt", "whole/decoder.pt"]
    assert told(folder, 1)["wrote"] == []


def test_states_apart_and_uneven_batches_are_refused(folder: Path) -> None:
    for rank in range(2):
        apart, uneven = told(folder, rank)["errors"]
        assert apart == "processes would go on from steps 0 to 1; give all of them one folder"
        assert "a batch of 5 has no even shares for 2 processes" in uneven


def test_a_single_process_is_one_without_an_accelerator(tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    try:
        made = together.trained(tmp_path / "with", 2, Accelerator(cpu=True), 0.1).state_dict()
    finally:
        AcceleratorState._reset_state(True)  # what is left behind would be every other test's
    plain = together.trained(tmp_path / "without", 2, None, 0.1).state_dict()
    assert all(torch.equal(made[name], plain[name]) for name in plain)


@pytest.mark.parametrize(("kind", "precision"), [("FSDP", "no"), ("NO", "fp16")])
def test_accelerators_that_shard_or_scale_are_refused(tmp_path: Path, kind: str, precision: str) -> None:
    standin = SimpleNamespace(distributed_type=SimpleNamespace(value=kind), mixed_precision=precision)
    words = f"type {kind} with mixed precision {precision}; use MULTI_GPU, and no or bf16"
    with pytest.raises(ValueError, match=words):
        together.trained(tmp_path, 1, standin)
