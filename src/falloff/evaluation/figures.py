"""A comparison's figures in words: the rows of its table, for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev
from typing import TYPE_CHECKING, NamedTuple

from falloff.evaluation.comparison import Arm, Comparison, MethodArm

if TYPE_CHECKING:
    from rich.table import Table

NONE = "-"
SIDE_BY_SIDE = 5
"""Columns of figures that a terminal of usual width shows side by side."""


class Row(NamedTuple):
    """One figure: its name, its value for dense and for every method, and what it means."""

    name: str
    cells: list[str]
    meaning: str


def columns(comparison: Comparison) -> list[str]:
    """Heads of the table's columns of figures."""
    return ["dense", *(arm.label for arm in comparison.methods)]


def rows(comparison: Comparison) -> list[Row]:
    """The table of figures, most wanted first."""
    dense, methods = comparison.dense, comparison.methods
    arms: list[Arm] = [dense, *methods]
    return [
        Row(
            "time",
            [seconds(median(arm.seconds)) for arm in arms],
            "The whole call, text encoder and autoencoder included; median over pairs of prompt and seed.",
        ),
        Row(
            "speed-up",
            ["1x", *(middle_and_range(comparison.speedups(arm)) for arm in methods)],
            "Dense time / the method's, pair by pair; median, and range over pairs.",
        ),
        Row(
            "taken by others",
            [percent(highest(arm.others)) for arm in arms],
            "Share of all processors' time that other programs, or other guests of the same host, took during a call; "
            "highest over pairs. Times of a machine that does other things say little.",
        ),
        Row(
            "predicted speed-up",
            [NONE, *(times(comparison.ceiling(arm.effective_density)) for arm in methods)],
            "By Amdahl's law from attention's share of the dense time, if attention's time followed its density.",
        ),
        Row(
            "attention's share",
            [percent(arm.attention_share) for arm in arms],
            "Self-attention's part of the transformer's time.",
        ),
        Row(
            "density",
            ["100%", *(percent(arm.density) for arm in methods)],
            "Computed / all token pairs, in the sparse calls.",
        ),
        Row(
            "effective density",
            ["100%", *(percent(arm.effective_density) for arm in methods)],
            "The same over all calls, those that stayed dense counted as 100%.",
        ),
        Row(
            "attention kept",
            ["100%", *(percent(arm.recall) for arm in methods)],
            "Share of the dense run's own attention that lies on the pairs which a method's plans keep, every layer "
            "planned; mean over sampled queries at three steps.",
        ),
        Row(
            "PSNR against dense",
            [f"floor: {decibels(dense.psnr)}", *(decibels(arm.psnr) for arm in methods)],
            "Closeness to the dense video of the same seed, mean and standard deviation over pairs; higher is "
            "closer. The dense column is the noise floor: dense against dense again.",
        ),
        Row(
            "SSIM against dense",
            [f"floor: {similarity(dense.ssim)}", *(similarity(arm.ssim) for arm in methods)],
            "Structural similarity to the dense video, 1 at most, mean and standard deviation over pairs.",
        ),
        Row(
            "peak memory",
            [memory(arm.peak_bytes) for arm in arms],
            memory_meaning(comparison.machine.get("device")),
        ),
        Row(
            "planning",
            [NONE, *(seconds(arm.plan_seconds) for arm in methods)],
            "Time a run spent on making plans; part of its time.",
        ),
        Row(
            "kernel",
            [NONE, *(" ".join(arm.kernels) or NONE for arm in methods)],
            "What computed the sparse calls.",
        ),
    ]


def table(comparison: Comparison) -> Table:
    """The figures for a terminal."""
    return terminal(f"{len(comparison.pairs)} pairs of prompt and seed", columns(comparison), rows(comparison))


def terminal(title: str, heads: Sequence[str], rows: Iterable[Row]) -> Table:
    """Rows of figures for a terminal. Of more than ``SIDE_BY_SIDE`` columns each becomes a line."""
    from rich.table import Table

    lines = [[row.name, *row.cells] for row in rows]
    if len(heads) > SIDE_BY_SIDE:
        lines = [list(line) for line in zip(["", *heads], *lines, strict=True)]
        (_, *heads), *lines = lines
    shown = Table(title=title, title_justify="left")
    shown.add_column("")
    for head in heads:
        shown.add_column(head, justify="right")
    for line in lines:
        shown.add_row(*line)
    return shown


def verdict(comparison: Comparison, arm: MethodArm) -> str:
    """What was measured next to what could be expected, in one sentence."""
    share = comparison.attention_share_of_run
    return (
        f"Self-attention takes {percent(share)} of a dense call: free attention would make it "
        f"{times(comparison.ceiling(0.0))} as fast, {arm.label}'s effective density of "
        f"{percent(arm.effective_density)} lets {times(comparison.ceiling(arm.effective_density))} be expected, and "
        f"{times(comparison.speedup(arm))} was measured."
    )


def seconds(value: float) -> str:
    if value >= 60:
        return f"{int(value // 60)} min {value % 60:.0f} s"
    return f"{value:.1f} s" if value >= 10 else f"{value:.2f} s" if value >= 0.1 else f"{value * 1000:.1f} ms"


def percent(share: float | None) -> str:
    if share is None:
        return NONE
    return f"{100 * share:.1f}%" if 0 < share < 0.995 else f"{100 * share:.0f}%"


def times(factor: float) -> str:
    return "∞" if math.isinf(factor) else f"{factor:.2f}x"


def mean_decibels(values: list[float]) -> str:
    """Mean over the videos that differ, for those that are equal have infinite PSNR."""
    finite = [value for value in values if math.isfinite(value)]
    return f"{fmean(finite):.1f} dB" if finite else "identical"


def decibels(values: list[float]) -> str:
    """Mean and spread; equal videos are counted apart."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return "identical"
    equal = len(values) - len(finite)
    return f"{_spread(finite, 1)} dB" + (f", {equal} of {len(values)} identical" if equal else "")


def similarity(values: list[float]) -> str:
    return _spread(values, 3)


def _spread(values: list[float], digits: int) -> str:
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {stdev(values):.{digits}f}"


def middle_and_range(factors: Sequence[float]) -> str:
    """Of speed-ups, one a pair."""
    middle = times(median(factors))
    return middle if len(factors) < 2 else f"{middle} ({min(factors):.2f} to {max(factors):.2f})"


def highest(shares: Sequence[float | None]) -> float | None:
    """Of those that are known."""
    return max((share for share in shares if share is not None), default=None)


def memory(peak_bytes: Sequence[int | None]) -> str:
    """The highest that is known."""
    known = [value for value in peak_bytes if value is not None]
    return f"{max(known) / 2**20:.0f} MiB" if known else NONE


def memory_meaning(device: str | None) -> str:
    if device == "cpu":
        return "Of the whole process, the weights included; highest over pairs."
    return "What torch had allocated on the device at most, the weights included; highest over pairs."
