"""``falloff train sparse``: a model tuned to a method that learns, from a folder of videos with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from falloff.cli import options
from falloff.cli import train_options as train


def sparse(
    videos: train.Videos,
    model: options.Model = None,
    method: train.Method_ = "sla",
    set_: options.Settings = [],  # noqa: B006 - typer reads the default and never writes to it
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    inference_steps: train.InferenceSteps = None,
    backbone: Annotated[
        str, typer.Option(help="What is trained besides the method's own: lora, full or none.")
    ] = "lora",
    rank: train.Rank = 128,
    aim: Annotated[
        str,
        typer.Option(
            help="velocity: that of the dense model; flow: the data, by flow matching; output: every layer's dense "
            "attention, a first stage with --backbone none."
        ),
    ] = "velocity",
    start: Annotated[
        Path | None,
        typer.Option(
            help="Output of such a first stage, or a file of what the method has learned, to start from.",
            show_default=False,
        ),
    ] = None,
    ramp: Annotated[
        int, typer.Option(min=0, help="Steps after which sparsity rises by 0.03; 0 for all of it at once.")
    ] = 0,
    steps: train.TrainingSteps = 2000,
    batch: train.Batch = 1,
    rate: train.Rate = 1e-5,
    ema: train.Ema = None,
    uncaptioned: train.Uncaptioned = 0.1,
    validation: train.Validation = 4,
    samples: train.Samples = 1,
    check_every: train.CheckEvery = 250,
    save_every: train.SaveEvery = 100,
    checkpointing: train.Checkpointing = False,
    precision: train.Precision = None,
    seed: train.Seed = 0,
    kernel: options.Kernel = "auto",
    cache: train.CacheFolder = None,
    output: train.Output = Path("sparse"),
) -> None:
    """Fine-tune a model to a method with parameters of its own, such as SLA."""
    with train.bench(model, method, set_, frames, height, width, inference_steps, kernel, output) as bench:
        from falloff.training import Course, Size, Sparse, train_sparse

        what = Sparse(
            size=Size(**bench.size),
            backbone=backbone,  # type: ignore[arg-type]  # Sparse checks it
            rank=rank,
            aim=aim,  # type: ignore[arg-type]  # as above
            ramp=ramp,
            uncaptioned=uncaptioned,
            validation=validation,
            samples=samples,
            checkpointing=checkpointing,
            precision=train.precision_of(precision),
        )
        course = Course(
            steps=steps, batch=batch, rate=rate, ema=ema, seed=seed, save_every=save_every, check_every=check_every
        )
        if backbone == "full":
            for transformer in bench.transformers:
                transformer.float()  # what is trained, is trained in single precision
        train_sparse(
            bench.pipe,
            videos,
            output,
            bench.method,
            what,
            course,
            start=start,
            schedule=bench.schedule,
            kernel=kernel,
            call=bench.call,
            cache=cache,
            fps=bench.fps,
            progress=bench.progress,
        )
    train.say("wrote", f"{output}: what was trained, its recipe.yaml, log.jsonl and samples")
    if aim == "output":
        recipe, same = output / "recipe.yaml", train.options_of(bench, model)
        train.say("second stage", f"falloff train sparse {videos} --method {recipe} --start {output} {same}")
    elif backbone != "full":
        train.say_how_to_use(bench, model, output, lora=backbone == "lora")
