"""``falloff compare``: a slow way and faster ones on the same prompts or classes, and a page that shows all."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import compare_images, options, pictures, settings
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps

METHODS = "radial"
PROMPTS = ("a red 3 moving right and a blue 7 moving up", "a green 5 moving left")
"""For the bundled miniature, which knows moving digits only."""


def compare(
    prompt: Annotated[
        list[str],
        typer.Option(help="What a video is to show; repeatable. The miniature has its own.", show_default=False),
    ] = [],  # noqa: B006 - typer reads the default and never writes to it
    model: options.Model = None,
    methods: Annotated[
        str,
        typer.Option(
            help="Methods to compare with dense, commas between; with settings as in 'radial(decay=0.5)', or a "
            "recipe's .yaml file."
        ),
    ] = METHODS,
    set_: options.Settings = [],  # noqa: B006 - as above
    seeds: Annotated[str, typer.Option(help="Seeds for every prompt, commas between.")] = "0",
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    kernel: options.Kernel = "auto",
    lora: options.Lora = None,
    image: options.Image = None,
    class_: Annotated[
        list[int],
        typer.Option(
            "--class",
            min=0,
            help="Compare ways to decode images of this class instead; repeatable.",
            show_default=False,
        ),
    ] = [],  # noqa: B006 - as above
    output: Annotated[Path, typer.Option(help="Folder for the page, its figures and the videos or images.")] = Path(
        "compare"
    ),
) -> None:
    """Measure what methods gain and cost against dense attention; or parallel decoding against sequential."""
    if class_ or (model is not None and checkpoints.decodes(model)):
        sizes = {"--frames": frames, "--height": height, "--width": width}
        video_only = {"--prompt": prompt, "--set": set_, "--lora": lora, "--image": image, **sizes}
        changed = {"--methods": methods != METHODS, "--kernel": kernel != "auto"}
        if given := [name for name, value in {**video_only, **changed}.items() if value]:
            raise CommandError(f"{', '.join(given)} cannot be given where images are decoded", USAGE)
        compare_images.run(model, class_, _seeds(seeds), steps=steps, guidance=guidance, output=output)
        return
    if not prompt and model is not None:
        raise CommandError("a model of yours needs at least one --prompt", USAGE)
    prompts = prompt or list(PROMPTS)
    for text in prompts:
        options.check_prompt(text)
    chosen = settings.choose_all(_list(settings.parts(methods), methods, "--methods"), set_)
    numbers = _seeds(seeds)
    options.check_kernel(kernel)
    options.check_folder(output)
    picture = pictures.opened(image)
    checkpoint = checkpoints.find(model)
    arguments = {**checkpoint.defaults, **options.call_arguments(frames, height, width, steps, guidance)}
    checkpoint.check_size(arguments)

    from rich.console import Console

    from falloff.cli import pipeline
    from falloff.evaluation import compare as evaluation
    from falloff.evaluation import figures, report

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}") as progress:
        pictures.check(checkpoint, picture)
        pipe = pipeline.load(checkpoint)
        arguments = pictures.added(pipe, arguments, picture)
        with pipeline.running(), pipeline.with_lora(pipe, lora):
            comparison = evaluation.compare(
                pipe,
                prompts,
                [choice.method for choice in chosen],
                seeds=numbers,
                schedule=[choice.schedule for choice in chosen],
                kernel=kernel,
                progress=lambda now: progress.show(now.doing, now.done, now.total),
                fps=checkpoint.fps,
                **arguments,
            )
    comparison = dataclasses.replace(comparison, model=checkpoint.name, command=shlex.join(["falloff", *sys.argv[1:]]))
    with told(OSError):
        page = report.write(comparison, output)[0]
    console = Console()
    console.print(figures.table(comparison))
    for arm in comparison.methods:
        console.print(figures.verdict(comparison, arm), highlight=False)
        for reason, count in arm.reasons.items():
            console.print(f"  {arm.label}: {count} calls stayed dense: {reason}", highlight=False)
    console.print(f"Open {page} to see them side by side.", highlight=False, soft_wrap=True)


def _list(parts: list[str], text: str, option: str) -> list[str]:
    if not all(parts):
        raise CommandError(f"{option} {text!r} must be names with commas between", USAGE)
    return parts


def _seeds(text: str) -> list[int]:
    parts = _list(settings.parts(text), text, "--seeds")
    if not all(part.isdecimal() for part in parts):
        raise CommandError(f"--seeds {text!r} must be whole numbers of at least 0 with commas between", USAGE)
    return [int(part) for part in parts]
