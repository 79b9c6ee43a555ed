"""``falloff compare`` of a model that decodes images: one token after another against parallel ways."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from falloff.cli import checkpoint as checkpoints
from falloff.cli import options
from falloff.cli.checkpoint import Checkpoint
from falloff.cli.errors import told
from falloff.cli.progress import Steps

if TYPE_CHECKING:
    from falloff.evaluation.decoding.compare import Judge

CLASSES = 10
"""Compared unless some are given."""


def run(
    model: str | None, classes: list[int], seeds: list[int], *, steps: int | None, guidance: float | None, output: Path
) -> None:
    """Compare, print the figures and write the page. Raises ``CommandError`` for whatever does not fit."""
    options.check_folder(output)
    checkpoint = checkpoints.find(model, by_class=True)
    arguments = {**checkpoint.defaults, **options.call_arguments(None, None, None, steps, guidance)}
    arguments.pop("order", None)  # every order is compared

    from rich.console import Console

    from falloff.cli import pipeline
    from falloff.decoding.pipeline import LPDPipeline
    from falloff.evaluation.decoding import figures, report
    from falloff.evaluation.decoding.compare import compare

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}", unit="picture") as progress:
        pipe = pipeline.load(checkpoint, LPDPipeline)
        chosen = classes or _spread(pipe.transformer.config.classes)
        judge = _judge(checkpoint, progress)
        with pipeline.running():
            comparison = compare(
                pipe,
                chosen,
                seeds=seeds,
                judge=judge,
                progress=lambda now: progress.show(now.doing, now.done, now.total),
                **arguments,
            )
    comparison = dataclasses.replace(comparison, model=checkpoint.name, command=shlex.join(["falloff", *sys.argv[1:]]))
    with told(OSError):
        page = report.write(comparison, output)[0]
    console = Console()
    console.print(figures.table(comparison))
    for arm in comparison.parallel:
        console.print(f"{arm.label}: {figures.verdict(comparison, arm)}", highlight=False)
    console.print(f"Open {page} to see the pictures side by side.", highlight=False, soft_wrap=True)


def _spread(count: int) -> list[int]:
    """At most CLASSES of so many, evenly spread."""
    chosen = min(CLASSES, count)
    return [count * n // chosen for n in range(chosen)]


def _judge(checkpoint: Checkpoint, progress: Steps) -> Judge | None:
    """Of the bundled miniature's pictures; nobody knows another model's classes."""
    from falloff.miniature import images

    if Path(checkpoint.source) != images.path():
        return None
    from falloff.miniature.images.measure import Judge

    progress.show("loading the judge")
    return Judge()
