from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from falloff.evaluation.bench.timing import Arm, BenchmarkError, Times, interleaved, tried

CPU = torch.device("cpu")
ONE = torch.ones(1)


@pytest.fixture
def threads() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


def test_every_round_runs_every_arm_in_turn(threads: int) -> None:
    ran: list[str] = []

    def arm(name: str) -> Arm:
        def forward() -> Tensor:
            ran.append(name)
            return ONE

        return Arm(forward)

    rounds: list[int] = []
    times = interleaved(
        {name: arm(name) for name in "abc"}, rounds=3, device=CPU, threads=threads, on_round=lambda: rounds.append(1)
    )
    assert "".join(ran) == "abcbcacab"
    assert len(rounds) == 3
    assert all(len(taken.forward) == 3 and min(taken.forward) >= 0 for taken in times.values())


def test_another_number_of_threads_is_not_reported(threads: int) -> None:
    def forward() -> Tensor:
        torch.set_num_threads(threads + 1)
        return ONE

    with pytest.raises(BenchmarkError, match=f"bad ran with {threads + 1} threads, expected {threads}"):
        interleaved({"bad": Arm(forward)}, rounds=1, device=CPU, threads=threads)


def test_the_surroundings_of_an_arm_are_entered_each_time_and_left(threads: int) -> None:
    said: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        said.append("in")
        yield
        said.append("out")

    def forward() -> Tensor:
        said.append("run")
        return ONE

    interleaved({"a": Arm(forward, around=around)}, rounds=2, device=CPU, threads=threads)
    assert said == ["in", "run", "out"] * 2


def test_arms_that_cannot_run_say_why() -> None:
    def broken() -> Tensor:
        raise AssertionError("no such\n  tile")

    able, refused = tried({"good": Arm(lambda: ONE), "bad": Arm(broken)}, CPU)
    assert list(able) == ["good"]
    assert refused == {"bad": "AssertionError: no such tile"}


def test_backward_is_timed_apart_and_counted_in(threads: int) -> None:
    gave: list[Tensor] = []

    def backward(out: Tensor) -> tuple[Tensor, ...]:
        gave.append(out)
        return (out,)

    times = interleaved({"a": Arm(lambda: ONE, backward)}, rounds=3, device=CPU, threads=threads)["a"]
    assert len(times.backward) == 3
    assert gave == [ONE] * 3
    assert Times([1.0, 2.0, 9.0], [5.0, 1.0, 1.0]).total == [6.0, 3.0, 10.0]
    assert Times([1.0, 2.0, 9.0], [5.0, 1.0, 1.0]).median == 6.0
    assert Times([1.0, 2.0, 9.0], []).median == 2.0
