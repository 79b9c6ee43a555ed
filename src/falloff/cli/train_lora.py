"""``falloff train lora``: a LoRA at home in sparse attention, from a folder of videos with captions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from falloff.cli import options
from falloff.cli import train_options as train


def lora(
    videos: train.Videos,
    model: options.Model = None,
    method: train.Method_ = "radial",
    set_: options.Settings = [],  # noqa: B006 - typer reads the default and never writes to it
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    inference_steps: train.InferenceSteps = None,
    rope: Annotated[str, typer.Option(help="Positions in time: plain, or riflex for longer videos.")] = "plain",
    rank: train.Rank = 128,
    steps: train.TrainingSteps = 2000,
    batch: train.Batch = 1,
    rate: train.Rate = 1e-4,
    ema: train.Ema = None,
    uncaptioned: train.Uncaptioned = 0.1,
    validation: train.Validation = 4,
    samples: train.Samples = 1,
    check_every: train.CheckEvery = 250,
    save_every: train.SaveEvery = 100,
    checkpointing: train.Checkpointing = False,
    precision: train.Precision = None,
    ulysses: Annotated[int, typer.Option(help="Processes that share the tokens of every video.")] = 1,
    seed: train.Seed = 0,
    kernel: options.Kernel = "auto",
    cache: train.CacheFolder = None,
    output: train.Output = Path("lora"),
) -> None:
    """Tune a model to its sparse attention, and to longer videos if more frames are asked for than it knows."""
    with train.bench(model, method, set_, frames, height, width, inference_steps, kernel, output) as bench:
        from falloff.training import Course, Lora, Size, train_lora

        what = Lora(
            size=Size(**bench.size),
            trained_frames=bench.usual["frames"] or bench.size["frames"],
            rank=rank,
            rope=rope,  # type: ignore[arg-type]  # Lora checks it
            uncaptioned=uncaptioned,
            validation=validation,
            samples=samples,
            checkpointing=checkpointing,
            precision=train.precision_of(precision),
            ulysses=ulysses,
        )
        course = Course(
            steps=steps, batch=batch, rate=rate, ema=ema, seed=seed, save_every=save_every, check_every=check_every
        )
        train_lora(
            bench.pipe,
            videos,
            output,
            bench.method,
            what,
            course,
            schedule=bench.schedule,
            kernel=kernel,
            call=bench.call,
            cache=cache,
            fps=bench.fps,
            progress=bench.progress,
        )
    train.say("wrote", f"{output}: the LoRA, its recipe.yaml, log.jsonl and samples")
    train.say_how_to_use(bench, model, output, lora=True)
