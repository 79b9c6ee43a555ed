"""``falloff bench model``: a whole transformer of true size, dense against sparse."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated

import typer

from falloff.cli import bench, options
from falloff.cli.errors import USAGE, told
from falloff.cli.progress import Steps


def model(
    shape: Annotated[
        str | None,
        typer.Option(
            help="miniature (default on a CPU), wan14b-720p (default on a GPU) or another name.", show_default=False
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="radial (with the model's preset), or a preset.")] = "radial",
    dtype: Annotated[
        str | None, typer.Option(help="float32 (default on a CPU), bfloat16 (default on a GPU) or float16.")
    ] = None,
    kernel: Annotated[
        list[str], typer.Option(help="A kernel for the sparse calls, or auto, the preferred one; repeatable.")
    ] = ["auto"],  # noqa: B006 - typer reads the default and never writes to it
    rounds: bench.Rounds = 5,
    threads: bench.Threads = None,
    device: bench.Device = None,
    output: bench.Output = None,
) -> None:
    """Measure one denoising step of a transformer of true size with random weights."""
    if dtype is not None:
        bench.check_dtype(dtype)
    for name in kernel:
        options.check_kernel(name)
    bench.check_output(output)
    where = bench.device_of(device, threads)

    import torch
    from rich.console import Console

    from falloff.cli import pipeline
    from falloff.evaluation.bench import maps, models, record, tables
    from falloff.evaluation.bench import model as measuring
    from falloff.evaluation.bench.timing import BenchmarkError
    from falloff.hosts import UnsupportedModelError

    with told(ValueError, code=USAGE):
        chosen = models.model_of(shape or bench.default_shape(where), bench.models())
        maps.method_of(method, chosen.shape)
    total, done = rounds + measuring.STEPS_BESIDES, 0
    with pipeline.quiet(), Steps("measuring the transformer") as progress, bench.quiet():

        def step(doing: str) -> None:
            nonlocal done
            progress.show(doing, done, total)
            done += 1

        with told(BenchmarkError, UnsupportedModelError, ValueError):
            row = measuring.measure(
                chosen,
                map_name=method,
                dtype=getattr(torch, dtype or bench.default_dtype(where)),
                device=where,
                kernel_names=kernel,
                rounds=rounds,
                progress=step,
            )
    console = Console()
    console.print(tables.model_title(row), highlight=False, markup=False, soft_wrap=True)
    console.print(tables.model_table(row))
    for note in tables.model_notes(row):
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        with told(OSError):
            record.write(output, shlex.join(["falloff", *sys.argv[1:]]), where, [row.to_dict()])
