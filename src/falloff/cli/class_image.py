"""``falloff generate --class``: one class, one image, by parallel decoding."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import options
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps


def make(model: str | None, label: int, *, steps: int | None, guidance: float | None, seed: int, output: Path) -> None:
    """Decode an image and write it. Raises ``CommandError`` for whatever is wrong with the arguments or the model."""
    if output.suffix.lower() != ".png":
        raise CommandError(f"--output {output} must end in .png", USAGE)
    options.check_folder(output.parent)
    checkpoint = checkpoints.find(model, by_class=True)
    arguments = {**checkpoint.defaults, **options.call_arguments(None, None, None, steps, guidance)}

    import torch

    from falloff.cli import pipeline
    from falloff.decoding.pipeline import LPDPipeline
    from falloff.evaluation import generate as evaluation

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}") as progress:
        pipe = pipeline.load(checkpoint, LPDPipeline)
        pipe.set_progress_bar_config(disable=True)
        with pipeline.running():
            evaluation.check_arguments(pipe, arguments)
            total = evaluation.steps(pipe, arguments)
            progress.show("decoding", 0, total)

            def after_step(_pipe: Any, step: int, _timestep: int, _tensors: dict[str, Any]) -> dict[str, Any]:
                progress.show("decoding" if step + 1 < total else "drawing", step + 1, total)
                return {}

            start = time.perf_counter()
            generator = torch.Generator().manual_seed(seed)
            image = pipe(label, generator=generator, callback_on_step_end=after_step, **arguments).images[0]
            seconds = time.perf_counter() - start
    with told(OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        beside = output.with_name(output.name + ".part")
        image.save(beside, format="PNG")
        os.replace(beside, output)
    typer.echo(f"{'decoded':<18}{pipe.transformer.tokens} tokens in {total} steps")
    typer.echo(f"{'total':<18}{seconds:.1f} s")
    typer.echo(f"{'wrote':<18}{output}: {image.width} x {image.height}")
