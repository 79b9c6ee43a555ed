"""Measurements in words, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from falloff.evaluation.bench.attention import ArmResult, Row
from falloff.evaluation.bench.model import ModelArm, ModelRow
from falloff.evaluation.figures import NONE, percent, seconds, times

if TYPE_CHECKING:
    from rich.table import Table


def attention_table(row: Row) -> Table:
    """One line an arm, then what all would be at an efficiency of 1; those that cannot run have no figures."""
    shown = _table(["time", "TFLOP/s", "speed-up", "efficiency", "new plan", "memory", "error"])
    for name, arm in row.arms.items():
        shown.add_row(name, *_cells(arm))
    if row.density:
        shown.add_row("ideal", *_ideal(row))
    for name in row.refused:
        shown.add_row(name, "not run", *[NONE] * 6)
    return shown


def _table(heads: list[str]) -> Table:
    """Narrow enough for 80 columns."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for head in heads:
        shown.add_column(head, justify="right", no_wrap=True)
    return shown


def title(row: Row) -> str:
    where = f"{row.tokens:,} tokens" + (f" ({row.grid})" if row.grid else "")
    planned = f", planned in {row.plan_ms:.1f} ms" if row.plan_ms is not None else ""
    return (
        f"{row.shape}: {row.heads} heads x {row.head_dim}, {where}, {row.dtype}"
        f"{', forward and backward' if row.backward else ''}\n"
        f"{row.map} map, blocks of {row.block}, density {percent(row.density)}{planned}"
    )


def notes(row: Row) -> list[str]:
    """What the table needs said: the measure of its ratios, and why arms cannot run."""
    return [
        f"Speed-up is over {row.best_dense}, the fastest dense attention here; efficiency is speed-up x density.",
        *_not_run(row.refused),
    ]


def _cells(arm: ArmResult) -> list[str]:
    return [
        seconds(arm.ms / 1e3),
        f"{arm.tflops:.3g}",
        times(arm.speedup),
        NONE if arm.efficiency is None else f"{arm.efficiency:.2f}",
        NONE if arm.launch_ms is None else seconds(arm.launch_ms / 1e3),
        memory(arm.extra_bytes),
        f"{arm.relative_error:.1e}",
    ]


def _ideal(row: Row) -> list[str]:
    """The fastest dense attention, were its time that of its pairs alone."""
    dense = row.arms[row.best_dense]
    return [seconds(dense.ms * row.density / 1e3), f"{dense.tflops:.3g}", times(1 / row.density), "1.00", *[NONE] * 3]


def memory(count: int | None) -> str:
    return NONE if count is None else f"{count / 2**20:,.0f} MiB"


def model_table(row: ModelRow) -> Table:
    """One line an arm; those that cannot run have no figures."""
    shown = _table(["forward", "speed-up", "attention", "peak memory", "kernel"])
    for name, arm in row.arms.items():
        shown.add_row(name, *_model_cells(arm))
    for name in row.refused:
        shown.add_row(name, "not run", *[NONE] * 4)
    return shown


def model_title(row: ModelRow) -> str:
    return (
        f"{row.shape}: {row.model}, {row.parameters / 1e6:,.0f} million random weights, {row.dtype}\n"
        f"{row.layers} layers of attention over {row.tokens:,} tokens ({row.grid}); {row.map} map, "
        f"density {percent(row.density)}"
    )


def model_notes(row: ModelRow) -> list[str]:
    """What was measured beside what could be expected, and why arms cannot run."""
    sparse = [f"{times(arm.speedup)} by {name}" for name, arm in row.arms.items() if arm.kind == "sparse"]
    lines = [
        f"Speed-up of a step with every layer sparse, over {row.best_dense}, the fastest dense model here: "
        f"{', '.join(sparse) or 'none measured'}.",
        f"Attention takes {percent(row.by_time.share)} of the dense time, which allows "
        f"{times(row.by_time.at_density)} at this density and {times(row.by_time.without_attention)} without any.",
        f"It has {percent(row.by_operations.share)} of the operations: {times(row.by_operations.at_density)} and "
        f"{times(row.by_operations.without_attention)} were all operations equally fast.",
    ]
    return [*lines, *_not_run(row.refused)]


def _not_run(refused: Mapping[str, str]) -> list[str]:
    """Others end their messages with a full stop of their own."""
    return [f"{name} was not run: {reason.rstrip('.')}." for name, reason in refused.items()]


def _model_cells(arm: ModelArm) -> list[str]:
    return [
        seconds(arm.ms / 1e3),
        times(arm.speedup),
        seconds(arm.attention_ms / 1e3),
        memory(arm.peak_bytes),
        " ".join(arm.kernels),
    ]
