"""The loop: every chance from the seed, every step resumable, the same on one process and many."""

import itertools
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from falloff.training import Course, TrainingError
from falloff.training.loop import LOG, STATE, drawn, train

COURSE = Course(steps=7, batch=2, rate=0.05, warmup=2, save_every=3, check_every=2)


class Killed(Exception):
    pass


def weights() -> dict[str, nn.Parameter]:
    return {"w": nn.Parameter(torch.linspace(-1, 1, 6)), "b": nn.Parameter(torch.zeros(()))}


def run(folder: Path, course: Course = COURSE, stop: int | None = None, **identity: object) -> dict[str, nn.Parameter]:
    """Fit a line to noise; ``stop``: die after that many steps."""
    parameters = weights()

    def loss(number: int, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(6, generator=generator)
        return (x @ parameters["w"] + parameters["b"] - x.sum() - number % 3).square()

    def on_step(now) -> None:
        if now.step == stop:
            raise Killed

    folder.mkdir(exist_ok=True)
    check = lambda step: {"validation": float(parameters["w"].detach().sum())}  # noqa: E731
    train(parameters, loss, course, folder, Accelerator(cpu=True), identity=identity, check=check, on_step=on_step)
    return parameters


def log(folder: Path) -> list[dict[str, float]]:
    entries = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]


@pytest.mark.parametrize("ema", [None, 0.5])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_training_ends_bit_for_bit_as_an_uninterrupted_one(
    tmp_path: Path, stop: int, ema: float | None
) -> None:
    course = replace(COURSE, ema=ema)
    whole = run(tmp_path / "whole", course)
    with pytest.raises(Killed):
        run(tmp_path / "cut", course, stop=stop)
    with (tmp_path / "cut" / LOG).open("a") as file:
        file.write('{"step": 4, "lo')  # as a kill in the middle of a line leaves it
    again = run(tmp_path / "cut", course)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert log(tmp_path / "cut") == log(tmp_path / "whole")
    assert [entry["step"] for entry in log(tmp_path / "whole") if "validation" in entry] == [0, 2, 4, 6, 7]


def test_what_a_step_says_nothing_of_stays_as_it_is(tmp_path: Path) -> None:
    """Neither the momentum of earlier steps nor weight decay moves it."""
    parameters = weights()
    seen = [{name: p.detach().clone() for name, p in parameters.items()}]

    def loss(number: int, generator: torch.Generator) -> torch.Tensor:
        return (parameters["w" if number % 2 else "b"] - 2).square().sum()

    def on_step(now) -> None:
        seen.append({name: p.detach().clone() for name, p in parameters.items()})

    train(parameters, loss, replace(COURSE, batch=1), tmp_path, Accelerator(cpu=True), identity={}, on_step=on_step)
    for number, (before, after) in enumerate(itertools.pairwise(seen)):
        still = {name for name in parameters if torch.equal(before[name], after[name])}
        assert still == {"b" if number % 2 else "w"}


def test_a_finished_training_can_be_made_longer(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")
    run(tmp_path / "more", replace(COURSE, steps=4))
    before = (tmp_path / "more" / STATE).stat().st_mtime_ns
    run(tmp_path / "more", replace(COURSE, steps=4))
    assert (tmp_path / "more" / STATE).stat().st_mtime_ns == before  # nothing left to do
    more = run(tmp_path / "more")
    assert all(torch.equal(more[name], whole[name]) for name in whole)


def test_other_settings_are_refused_with_their_names(tmp_path: Path) -> None:
    run(tmp_path, method="radial")
    with pytest.raises(TrainingError, match=r"method was radial and is now svg2, rate was 0\.05 and is now 0\.1;"):
        run(tmp_path, replace(COURSE, rate=0.1), method="svg2")


def test_the_average_is_what_is_validated_and_kept(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    averaged = run(tmp_path / "averaged", replace(COURSE, ema=0.9))
    assert not torch.equal(plain["w"], averaged["w"])
    state = torch.load(tmp_path / "averaged" / STATE, weights_only=True)
    assert torch.equal(state["parameters"]["w"], plain["w"])  # the average does not touch the training
    assert torch.equal(state["average"]["w"], averaged["w"])
    assert log(tmp_path / "averaged")[-1]["validation"] == pytest.approx(float(averaged["w"].detach().sum()))


def test_a_round_takes_every_clip_once() -> None:
    rounds = [[drawn(n, 5, seed=1) for n in range(start, start + 5)] for start in (0, 5, 10)]
    assert all(sorted(each) == list(range(5)) for each in rounds)
    assert rounds[0] != rounds[1] or rounds[1] != rounds[2]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    parameters = weights()
    with pytest.raises(ArithmeticError, match="loss of step 1 is nan"):
        train(
            parameters,
            lambda number, generator: parameters["b"] * float("nan"),
            COURSE,
            tmp_path,
            Accelerator(cpu=True),
            identity={},
        )
    assert not (tmp_path / STATE).exists()


@pytest.mark.parametrize(
    ("field", "value"), [("steps", 0), ("batch", 0), ("rate", 0.0), ("ema", 1.0), ("warmup", -1), ("check_every", 0)]
)
def test_settings_are_checked(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} = {value}"):
        replace(COURSE, **{field: value})


@pytest.mark.slow
def test_two_processes_do_what_one_does(tmp_path: Path) -> None:
    alone = run(tmp_path / "alone")
    code = f"import sys; sys.path.append({str(Path(__file__).parent)!r}); import test_loop; test_loop.one_of_two()"
    root = Path(__file__).parents[2] / "src"
    common = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "true",
    }
    environment = {
        **os.environ,
        **common,
        "PYTHONPATH": str(root),
        "FALLOFF_TEST": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    both = [subprocess.Popen([sys.executable, "-c", code], env={**environment, **rank}) for rank in ranks]
    assert [process.wait(timeout=240) for process in both] == [0, 0]
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, parameter in alone.items():
            torch.testing.assert_close(together[name], parameter.detach())
    assert [entry["step"] for entry in log(tmp_path / "two")] == [entry["step"] for entry in log(tmp_path / "alone")]


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def one_of_two() -> None:
    folder = Path(os.environ["FALLOFF_TEST"])
    parameters = run(folder / "two")
    assert Accelerator().num_processes == 2
    torch.save({name: p.detach() for name, p in parameters.items()}, folder / f"{os.environ['RANK']}.pt")
