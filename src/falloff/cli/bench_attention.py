"""``falloff bench attention``: every kernel that can run here, against dense attention."""

from __future__ import annotations

import shlex
import sys
from itertools import product
from typing import Annotated

import typer

from falloff.cli import bench
from falloff.cli.errors import USAGE, told
from falloff.cli.progress import Steps


def attention(
    shape: Annotated[
        list[str],
        typer.Option(
            help="miniature (default on a CPU), wan14b-720p (default on a GPU) or another name, or "
            "HEADS,DIM,FRAMESxHEIGHTxWIDTH or HEADS,DIM,TOKENS; repeatable.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - typer reads the default and never writes to it
    map_: Annotated[
        list[str],
        typer.Option("--map", help="radial (with the model's preset), random:DENSITY, or a preset; repeatable."),
    ] = ["radial"],  # noqa: B006 - as above
    block: Annotated[int | None, typer.Option(min=1, help="Tokens a block; the map's own unless given.")] = None,
    dtype: Annotated[
        list[str], typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU) or float16; repeatable.")
    ] = [],  # noqa: B006 - as above
    kernel: Annotated[
        list[str], typer.Option(help="A kernel; repeatable. All that can run unless given.", show_default=False)
    ] = [],  # noqa: B006 - as above
    backward: Annotated[bool, typer.Option("--backward", help="Time forward and backward together.")] = False,
    rounds: bench.Rounds = 7,
    threads: bench.Threads = None,
    device: bench.Device = None,
    output: bench.Output = None,
) -> None:
    """Measure attention kernels on block maps of real work."""
    for name in dtype:
        bench.check_dtype(name)
    bench.check_output(output)
    where = bench.device_of(device, threads)

    from rich.console import Console

    from falloff.evaluation.bench import attention as measuring
    from falloff.evaluation.bench import maps, record, tables
    from falloff.evaluation.bench.shapes import shape_of
    from falloff.evaluation.bench.timing import BenchmarkError

    with told(ValueError, code=USAGE):
        measuring.check_kernels(kernel)
        chosen = [shape_of(text, bench.shapes()) for text in shape or [bench.default_shape(where)]]
        for each, name in product(chosen, map_):
            maps.check(name, each, block)
    works = [
        measuring.Work(shape=each, map=name, block=block, dtype=precision, backward=backward)
        for each, name, precision in product(chosen, map_, dtype or [bench.default_dtype(where)])
    ]
    rows = []
    total, done = len(works) * (rounds + measuring.STEPS_BESIDES), 0
    with Steps("measuring attention") as progress, bench.quiet(), told(BenchmarkError, ValueError):

        def step(doing: str) -> None:
            nonlocal done
            progress.show(doing, done, total)
            done += 1

        for work in works:
            rows.append(measuring.measure(work, device=where, kernel_names=kernel, rounds=rounds, progress=step))
    console = Console()
    for row in rows:
        console.print(tables.title(row), highlight=False, markup=False, soft_wrap=True)
        console.print(tables.attention_table(row))
        for note in tables.notes(row):
            console.print(note, highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        with told(OSError):
            record.write(output, shlex.join(["falloff", *sys.argv[1:]]), where, [row.to_dict() for row in rows])
