"""Interleaved medians: every round runs all arms once, so that a machine that warms up or slows down favours none."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from falloff.reporting import Stopwatch

COLD_BYTES = 64 << 20
"""Written before every timed call where the size of the last cache is unknown: more than most of them hold."""
SAID_CHARACTERS = 300


class BenchmarkError(RuntimeError):
    """A measurement that cannot be made here, or must not be reported."""


class Arm(NamedTuple):
    """One way to do the work. ``around`` is entered before every timed call and left after it, outside the clock."""

    forward: Callable[[], Tensor]
    backward: Callable[[Tensor], tuple[Tensor, ...]] | None = None
    around: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Times:
    """Seconds of every round, of the forward and, where there is one, of the backward."""

    forward: list[float]
    backward: list[float]

    @property
    def total(self) -> list[float]:
        return [sum(both) for both in zip(self.forward, self.backward, strict=True)] if self.backward else self.forward

    @property
    def median(self) -> float:
        return statistics.median(self.total)


def tried(arms: Mapping[str, Arm], device: torch.device) -> tuple[dict[str, Arm], dict[str, str]]:
    """The arms that can run, each run once, and why the others cannot.

    This is the warm-up: compilation and first allocations happen here, outside the clock.
    """
    able: dict[str, Arm] = {}
    refused: dict[str, str] = {}
    for name, arm in arms.items():
        try:
            with arm.around():
                once(arm, device)
            able[name] = arm
        except Exception as error:  # foreign kernels raise what they like, and must not end the others' measurement
            refused[name] = said(error)
    return able, refused


def interleaved(
    arms: Mapping[str, Arm],
    *,
    rounds: int,
    device: torch.device,
    threads: int,
    on_round: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Times of each arm, caches cold. The order of the arms, which must have been tried, rotates with the rounds.

    Raises ``BenchmarkError`` when an arm runs with another number of threads than the one given.
    """
    cold = torch.empty(cold_bytes(device), dtype=torch.uint8, device=device)
    times = {name: Times([], []) for name in arms}
    names = list(arms)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            with arms[name].around():
                cold.zero_()
                taken = once(arms[name], device)
            if torch.get_num_threads() != threads:
                raise BenchmarkError(
                    f"{name} ran with {torch.get_num_threads()} threads, expected {threads}: not reported"
                )
            times[name].forward.append(taken[0])
            times[name].backward.extend(taken[1:])
        on_round()
    return times


def cold_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return COLD_BYTES


def said(error: Exception) -> str:
    """An error of somebody else's code in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:SAID_CHARACTERS]


def once(arm: Arm, device: torch.device) -> list[float]:
    """Seconds of one forward and, where there is one, its backward. Waits for the device at the end only."""
    watch = Stopwatch(device)
    out = arm.forward()
    watches = [watch.stop()]
    if arm.backward is not None:
        watch = Stopwatch(device)
        arm.backward(out)
        watches.append(watch.stop())
    return [watch.seconds() or 0.0 for watch in watches]
