"""``falloff generate``: one prompt, one video or image; or one class, one image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import class_image, options, pictures, settings
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps

METHOD = "radial"
SUFFIXES = (".mp4", ".png")


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video is to show.", show_default=False)] = None,
    model: options.Model = None,
    method: Annotated[
        str, typer.Option(help="How attention is computed, one of 'falloff methods', or a recipe's .yaml file.")
    ] = METHOD,
    set_: options.Settings = [],  # noqa: B006 - typer reads the default and never writes to it
    frames: options.Frames = None,
    height: options.Height = None,
    width: options.Width = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same noise.")] = 0,
    kernel: options.Kernel = "auto",
    lora: options.Lora = None,
    image: options.Image = None,
    class_: Annotated[
        int | None,
        typer.Option("--class", min=0, help="Decode an image of this class instead of a prompt.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="An .mp4 file, or .png for an image; out.mp4 or out.png unless given.", show_default=False),
    ] = None,
) -> None:
    """Make a video with sparse attention, and tell what was computed; or decode an image of a class."""
    if class_ is not None:
        video_only: dict[str, Any] = {
            "PROMPT": prompt,
            "--set": set_,
            "--frames": frames,
            "--height": height,
            "--width": width,
        }
        video_only |= {"--lora": lora, "--image": image}
        changed = {"--method": method != METHOD, "--kernel": kernel != "auto"}
        if given := [name for name, value in {**video_only, **changed}.items() if value]:
            raise CommandError(f"{', '.join(given)} cannot be given with --class, which makes one image", USAGE)
        target = output or Path("out.png")
        class_image.make(model, class_, steps=steps, guidance=guidance, seed=seed, output=target)
        return
    if prompt is None:
        raise CommandError("Missing argument 'PROMPT', or --class; see 'falloff generate --help'", USAGE)
    _video(
        prompt,
        model,
        lora,
        image,
        settings.choose(method, set_),
        kernel,
        seed,
        output,
        options.call_arguments(frames, height, width, steps, guidance),
    )


def _video(
    prompt: str,
    model: str | None,
    lora: str | None,
    image: Path | None,
    chosen: settings.Chosen,
    kernel: str,
    seed: int,
    output: Path | None,
    given: dict[str, Any],
) -> None:
    options.check_prompt(prompt)
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise CommandError(f"--output {output} must end in {' or '.join(SUFFIXES)}", USAGE)
    options.check_kernel(kernel)
    options.check_folder((output or Path()).parent)
    picture = pictures.opened(image)
    checkpoint = checkpoints.find(model)
    arguments = {**checkpoint.defaults, **given}
    checkpoint.check_size(arguments)

    from falloff import api
    from falloff.cli import pipeline
    from falloff.evaluation import generate as evaluation
    from falloff.evaluation import video

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}") as progress:
        pictures.check(checkpoint, picture)
        if (kind := checkpoint.kind()) is not None:
            _target(output, kind, arguments)
        pipe = pipeline.load(checkpoint)
        arguments = pictures.added(pipe, arguments, picture)
        with pipeline.running(), pipeline.with_lora(pipe, lora):
            evaluation.check_arguments(pipe, arguments)
            target = _target(output, type(pipe), arguments)
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
        target.parent.mkdir(parents=True, exist_ok=True)
        video.write(target, made.frames_FHWC, checkpoint.fps)
    count, tall, wide, _ = made.frames_FHWC.shape
    frames = f"{count} frames of {wide} x {tall} at {checkpoint.fps:g} a second" if count > 1 else f"{wide} x {tall}"
    typer.echo(report)
    typer.echo(f"{'total':<18}{made.seconds:.1f} s")
    typer.echo(f"{'wrote':<18}{target}: {frames}")


def _target(output: Path | None, kind: type, arguments: Mapping[str, Any]) -> Path:
    """The file to write. Raises ``CommandError`` for one that cannot hold what a pipeline of this class makes."""
    from falloff.evaluation import generate as evaluation

    frames = evaluation.takes(kind, "num_frames") and arguments.get("num_frames") != 1
    if output is None:
        return Path("out.mp4" if frames else "out.png")
    if frames and output.suffix.lower() == ".png":
        raise CommandError(f"{kind.__name__} makes videos; --output {output} must end in .mp4", USAGE)
    return output
