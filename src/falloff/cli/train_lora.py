"""``falloff train lora``: a LoRA at home in sparse attention, from a folder of videos with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import options, settings
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps


def lora(
    videos: Annotated[
        Path, typer.Argument(help="Folder of videos with a .txt beside each, or a .jsonl, or .tar shards.")
    ],
    model: options.Model = None,
    method: Annotated[
        str, typer.Option(help="How attention is computed, one of 'falloff methods', or a recipe's .yaml file.")
    ] = "radial",
    set_: options.Settings = [],  # noqa: B006 - typer reads the default and never writes to it
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    inference_steps: Annotated[
        int | None,
        typer.Option(
            min=1, help="Denoising steps that the LoRA is for: they tell which stay dense.", show_default=False
        ),
    ] = None,
    rope: Annotated[str, typer.Option(help="Positions in time: plain, or riflex for longer videos.")] = "plain",
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps of training in all.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="Clips a step, over all GPUs.")] = 1,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    ema: Annotated[
        float | None, typer.Option(help="Decay of an average of the weights, such as 0.99; none unless given.")
    ] = None,
    uncaptioned: Annotated[float, typer.Option(help="Share of clips trained without caption, for guidance.")] = 0.1,
    validation: Annotated[int, typer.Option(min=0, help="Clips kept out for the validation loss.")] = 4,
    samples: Annotated[int, typer.Option(min=0, help="Of those, clips whose caption a video is made of.")] = 1,
    check_every: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 250,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between states to go on from.")] = 100,
    checkpointing: Annotated[
        bool, typer.Option(help="Compute activations again for the gradient, which needs less memory.")
    ] = False,
    precision: Annotated[
        str | None, typer.Option(help="no or bf16; bf16 on a GPU unless given.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same training.")] = 0,
    kernel: options.Kernel = "auto",
    cache: Annotated[
        Path | None,
        typer.Option(help="Where latents and text are kept; OUTPUT/cache unless given.", show_default=False),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the LoRA; a training there is gone on with.")] = Path("lora"),
) -> None:
    """Tune a model to its sparse attention, and to longer videos if more frames are asked for than it knows."""
    chosen = settings.choose(method, set_)
    options.check_kernel(kernel)
    options.check_folder(output)
    checkpoint = checkpoints.find(model)
    given = options.call_arguments(frames, height, width, inference_steps, None)
    arguments = {**checkpoint.defaults, **given}
    checkpoint.check_size(arguments)

    import torch

    from falloff import api
    from falloff.cli import pipeline
    from falloff.recipe import Recipe, RecipeError
    from falloff.training import Course, Lora, Size, train_lora

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}") as progress:
        pipe = pipeline.load(checkpoint)
        with pipeline.running(), told(OSError, RecipeError):
            size = _size(pipe, arguments)
            what = Lora(
                size=Size(**size),
                trained_frames=_size(pipe, checkpoint.defaults)["frames"],
                rank=rank,
                rope=rope,  # type: ignore[arg-type]  # checked by Lora
                uncaptioned=uncaptioned,
                validation=validation,
                samples=samples,
                checkpointing=checkpointing,
                precision=precision or ("bf16" if torch.cuda.is_available() else "no"),  # type: ignore[arg-type]  # as above
            )
            course = Course(
                steps=steps, batch=batch, rate=rate, ema=ema, seed=seed, save_every=save_every, check_every=check_every
            )
            way = chosen.method
            if isinstance(way, Recipe):
                api.check_recipe(pipe, way)
                way = way.method
            recipe = train_lora(
                pipe,
                videos,
                output,
                way,
                what,
                course,
                schedule=chosen.schedule,
                kernel=kernel,
                call=arguments,
                cache=cache,
                fps=checkpoint.fps,
                progress=progress.show,
            )
    typer.echo(f"{'wrote':<18}{output}: the LoRA, its recipe.yaml, log.jsonl and samples")
    typer.echo(
        f"{'use it with':<18}--lora {output} --method {output / 'recipe.yaml'} --frames {recipe.evidence['frames']}"
    )


def _size(pipe: object, arguments: dict[str, int]) -> dict[str, int]:
    """Frames, height and width of a pipeline call, by the pipeline's own defaults where it has some."""
    from falloff.evaluation import generate

    found = {}
    for name, label in (("num_frames", "frames"), ("height", "height"), ("width", "width")):
        value = arguments.get(name) or generate.default(pipe, name)
        if not isinstance(value, int):
            raise CommandError(f"{type(pipe).__name__} has no size of its own; give --{label}", USAGE)
        found[label] = value
    return found
