"""``falloff generate``: one prompt, one video."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import options, settings
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps


def generate(
    prompt: Annotated[str, typer.Argument(help="What the video is to show.")],
    model: options.Model = None,
    method: Annotated[
        str, typer.Option(help="How attention is computed, one of 'falloff methods', or a recipe's .yaml file.")
    ] = "radial",
    set_: options.Settings = [],  # noqa: B006 - typer reads the default and never writes to it
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same noise.")] = 0,
    kernel: options.Kernel = "auto",
    output: Annotated[Path, typer.Option(help="The video, an .mp4 file.")] = Path("out.mp4"),
) -> None:
    """Make a video with sparse attention, and tell what was computed."""
    options.check_prompt(prompt)
    if output.suffix.lower() != ".mp4":
        raise CommandError(f"--output {output} must end in .mp4", USAGE)
    chosen = settings.choose(method, set_)
    options.check_kernel(kernel)
    options.check_folder(output.parent)
    checkpoint = checkpoints.find(model)
    arguments = {**checkpoint.defaults, **options.call_arguments(frames, height, width, steps, guidance)}
    checkpoint.check_size(arguments)

    from falloff import api
    from falloff.cli import pipeline
    from falloff.evaluation import generate as evaluation
    from falloff.evaluation import video

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}") as progress:
        pipe = pipeline.load(checkpoint)
        with pipeline.running():
            evaluation.check_arguments(pipe, arguments)
            total = evaluation.steps(pipe, arguments)
            done = 0
            progress.show("generating", done, total)

            def step() -> None:
                nonlocal done
                done += 1
                progress.show("generating" if done < total else "decoding", done, total)

            with api.using(pipe, chosen.method, schedule=chosen.schedule, kernel=kernel, timing=True):
                made = evaluation.generate(pipe, prompt, seed=seed, call_arguments=arguments, on_step=step)
                report = api.report(pipe)
    with told(OSError):
        output.parent.mkdir(parents=True, exist_ok=True)
        video.write(output, made.frames_FHWC, checkpoint.fps)
    count, tall, wide, _ = made.frames_FHWC.shape
    typer.echo(report)
    typer.echo(f"{'total':<18}{made.seconds:.1f} s")
    typer.echo(f"{'wrote':<18}{output}: {count} frames of {wide} x {tall} at {checkpoint.fps:g} a second")
