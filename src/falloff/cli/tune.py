"""``falloff tune``: settings for a model that reach a fidelity in the least time, as a recipe."""

from __future__ import annotations

import dataclasses
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import options, pictures, settings
from falloff.cli.compare import PROMPTS
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps

if TYPE_CHECKING:
    from rich.table import Table

    from falloff.evaluation.tried import Goal
    from falloff.evaluation.tune import Tuned

SHOWN = 12
"""Candidates told of: the cheapest that reached the goal, then the closest of the others."""


def tune(
    psnr: Annotated[
        float | None, typer.Option(help="Goal: mean PSNR against dense in dB, from whole generations.")
    ] = None,
    recall: Annotated[
        float | None,
        typer.Option(help="Goal: share of attention kept, 0 to 1. Judges many settings in one dense run."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.1, help="Time to search, about.")] = 10.0,
    prompt: Annotated[
        list[str],
        typer.Option(help="What a video is to show; repeatable. The miniature has its own.", show_default=False),
    ] = [],  # noqa: B006 - typer reads the default and never writes to it
    model: options.Model = None,
    methods: Annotated[str, typer.Option(help="Methods to search, commas between.")] = "radial",
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same noise.")] = 0,
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    kernel: options.Kernel = "auto",
    image: options.Image = None,
    output: Annotated[
        Path, typer.Option(help="The recipe, a .yaml file. Beside it stand the trials: run again to go on with them.")
    ] = Path("recipe.yaml"),
) -> None:
    """Search the settings that keep a fidelity at the least cost, and write them as a recipe."""
    if (psnr is None) == (recall is None):
        raise CommandError("give one goal: --psnr, or --recall", USAGE)
    if output.suffix not in (".yaml", ".yml"):
        raise CommandError(f"--output {output} must end in .yaml", USAGE)
    if not prompt and model is not None:
        raise CommandError("a model of yours needs at least one --prompt", USAGE)
    prompts = prompt or list(PROMPTS)
    for text in prompts:
        options.check_prompt(text)
    options.check_kernel(kernel)
    options.check_folder(output.parent)
    picture = pictures.opened(image)
    checkpoint = checkpoints.find(model)
    arguments = {**checkpoint.defaults, **options.call_arguments(frames, height, width, steps, guidance)}
    checkpoint.check_size(arguments)

    from rich.console import Console

    from falloff.cli import pipeline
    from falloff.evaluation import figures
    from falloff.evaluation import tune as tuning
    from falloff.evaluation.tried import Goal

    with told(ValueError, code=USAGE):
        goal = Goal("psnr", psnr) if psnr is not None else Goal("recall", recall or 0.0)
        names = settings.parts(methods)
        tuning.kinds(names)
    output.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with pipeline.quiet(), Steps(f"loading {checkpoint.name}", unit="second") as progress:
        pictures.check(checkpoint, picture)
        pipe = pipeline.load(checkpoint)
        arguments = pictures.added(pipe, arguments, picture)
        with pipeline.running():
            tuned = tuning.tune(
                pipe,
                prompts,
                names,
                goal=goal,
                seconds=60 * minutes,
                seeds=[seed],
                kernel=kernel,
                trials=output.with_name(output.name + ".trials"),
                say=lambda doing: progress.show(doing, int(time.monotonic() - began), int(60 * minutes)),
                **arguments,
            )
    command = shlex.join(["falloff", *sys.argv[1:]])
    evidence = {"model": checkpoint.name, "command": command, **tuned.recipe.evidence}
    with told(OSError):
        dataclasses.replace(tuned.recipe, evidence=evidence).save(output)
    console = Console()
    console.print(_table(tuned, goal), highlight=False)
    console.print(figures.table(tuned.comparison))
    console.print(
        f"Wrote {output}: falloff generate PROMPT --method {output}, or falloff.enable(pipe, "
        f'falloff.Recipe.load("{output}")).',
        highlight=False,
        soft_wrap=True,
    )


def _table(tuned: Tuned, goal: Goal) -> Table:
    from rich.table import Table

    from falloff.evaluation.tried import costs

    by_cost = [each for _, each in sorted(zip(costs(tuned.tried), tuned.tried, strict=True), key=lambda pair: pair[0])]
    reached = [each for each in by_cost if each.judged.fidelity >= goal.target]
    others = [each for each in by_cost if each.judged.fidelity < goal.target]
    others.sort(key=lambda each: -each.judged.fidelity)
    by_psnr = goal.measure == "psnr"
    shown = Table(title=f"{len(tuned.tried)} candidates, {len(reached)} reached {goal}", title_justify="left")
    for head in ("of dense time", "density", "PSNR") if by_psnr else ("density", "kept"):
        shown.add_column(head, justify="right", no_wrap=True)
    shown.add_column("settings that differ from the defaults")
    for each in [*reached, *others][:SHOWN]:
        cost, density, fidelity = each.judged
        figures = (
            (f"{cost:.0%}", f"{density:.0%}", f"{fidelity:.1f} dB")
            if by_psnr
            else (f"{density:.0%}", f"{fidelity:.1%}")
        )
        shown.add_row(*figures, each.words())
    return shown
