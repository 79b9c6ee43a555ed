"""A comparison's figures in words: the rows of its table, for the terminal and the page."""

from __future__ import annotations

from statistics import fmean, median
from typing import TYPE_CHECKING

from falloff.evaluation import figures
from falloff.evaluation.decoding.comparison import Arm, Comparison
from falloff.evaluation.figures import NONE, Row

if TYPE_CHECKING:
    from rich.table import Table


def columns(comparison: Comparison) -> list[str]:
    return [arm.label for arm in comparison.arms]


def rows(comparison: Comparison) -> list[Row]:
    """The table of figures, most wanted first."""
    arms, parallel = comparison.arms, comparison.parallel
    return [
        Row("steps", [str(arm.steps) for arm in arms], "Passes through the model; each decodes a group of tokens."),
        Row(
            "time",
            [figures.seconds(median(arm.seconds)) for arm in arms],
            "Of one picture alone, pixels included; median over pictures.",
        ),
        Row(
            "times faster",
            ["1x", *(figures.middle_and_range(comparison.speedups(arm)) for arm in parallel)],
            "Sequential time / this way's, picture by picture; median, and range over pictures.",
        ),
        *_judged(arms),
        *_agreeing(comparison),
        Row(
            "computed",
            [_floating(arm.flops) for arm in arms],
            "Floating-point operations of a picture's tokens, counted. Parallel decoding makes fewer passes, not less "
            "work.",
        ),
        Row("cache", [_size(arm.cache_bytes) for arm in arms], "Keys and values at the end of a picture, counted."),
        Row(
            "peak memory",
            [figures.memory(arm.peak_bytes) for arm in arms],
            figures.memory_meaning(comparison.machine.get("device")),
        ),
    ]


def table(comparison: Comparison) -> Table:
    """The figures for a terminal."""
    return figures.terminal(f"{pictures(len(comparison.asked))} by each way", columns(comparison), rows(comparison))


def verdict(comparison: Comparison, arm: Arm) -> str:
    """What was gained and what it cost, in a sentence."""
    gain = (
        f"{arm.steps} steps instead of {comparison.sequential.steps} were "
        f"{figures.times(comparison.speedup(arm))} as fast"
    )
    before, after = comparison.sequential.scores, arm.scores
    if before is None or after is None:
        return (
            f"{gain}; {agreement(arm)} of the tokens are those that decoding one by one draws too. How good the "
            "pictures are is for the eye: there is no judge of this model's classes."
        )
    return (
        f"{gain}; of {pictures(after.pictures)} {figures.percent(after.accuracy)} are read as the class asked for, "
        f"{figures.percent(before.accuracy)} of the sequential ones."
    )


def pictures(count: int) -> str:
    return "1 picture" if count == 1 else f"{count} pictures"


def agreement(arm: Arm) -> str:
    return figures.percent(None if arm.agreement is None else fmean(arm.agreement))


def distance(arm: Arm) -> str:
    """The Frechet distance, where there is one."""
    return NONE if arm.scores is None or arm.scores.frechet is None else f"{arm.scores.frechet:.3f}"


def _agreeing(comparison: Comparison) -> list[Row]:
    if comparison.chance is None:
        return []
    return [
        Row(
            "tokens kept",
            [f"chance: {figures.percent(comparison.chance)}", *map(agreement, comparison.parallel)],
            "Tokens that decoding one by one draws too, in the same order and with the same random numbers: all others "
            "were changed by deciding tokens together, for better or worse. Chance is what pictures of one class have "
            "in common.",
        )
    ]


def _judged(arms: list[Arm]) -> list[Row]:
    scores = [arm.scores for arm in arms if arm.scores is not None]
    if not scores:
        return []
    read = Row(
        "read as asked",
        [figures.percent(each.accuracy) for each in scores],
        f"Of {pictures(scores[0].pictures)}, those that a classifier trained on real ones reads as asked.",
    )
    if scores[0].frechet is None:
        return [read]
    far = Row(
        "Frechet distance",
        [distance(arm) for arm in arms],
        "Between normal distributions fitted to the classifier's features of these pictures and of real ones; told of "
        "more pictures than features, and comparable between equally many only.",
    )
    return [read, far]


def _floating(count: int) -> str:
    power, name = next((p, n) for p, n in ((12, "TFLOP"), (9, "GFLOP"), (6, "MFLOP"), (0, "FLOP")) if count >= 10**p)
    return f"{count / 10**power:.3g} {name}"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
