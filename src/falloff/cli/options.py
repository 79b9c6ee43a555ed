"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from falloff.cli.errors import USAGE, CommandError

Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint folder, or name on the hub. The bundled miniature unless given.", show_default=False),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="A setting of the method or of its schedule, such as decay=0.5 or dense_first=2; repeatable.",
        show_default=False,
    ),
]
Frames = Annotated[int | None, typer.Option(min=1, help="Video frames.", show_default=False)]
Height = Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default=False)]
Width = Annotated[int | None, typer.Option(min=1, help="Pixels.", show_default=False)]
Steps = Annotated[int | None, typer.Option(min=1, help="Denoising steps.", show_default=False)]
Guidance = Annotated[float | None, typer.Option(min=0.0, help="Guidance scale.", show_default=False)]
Image = Annotated[
    Path | None,
    typer.Option(
        help="Picture to begin with, for image to video; scaled to the video's size, its middle kept where it is too "
        "wide or too tall.",
        show_default=False,
    ),
]
Kernel = Annotated[str, typer.Option(help="Kernel for sparse calls; 'falloff doctor' lists them.")]

Lora = Annotated[
    str | None,
    typer.Option(help="A LoRA: the folder of 'falloff train lora', or a .safetensors file.", show_default=False),
]


def call_arguments(
    frames: int | None, height: int | None, width: int | None, steps: int | None, guidance: float | None
) -> dict[str, Any]:
    """Arguments of a pipeline call, of what was given."""
    given = {
        "num_frames": frames,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    return {name: value for name, value in given.items() if value is not None}


def check_prompt(prompt: str) -> None:
    if not prompt.strip():
        raise CommandError("the prompt is empty; say what the video is to show", USAGE)


def check_kernel(kernel: str) -> None:
    from falloff import kernels

    ways = {name: (can, why) for name, can, why in kernels.available()}
    if kernel != "auto" and kernel not in ways:
        raise CommandError(f"unknown kernel {kernel!r}; choose auto or one of {', '.join(ways)}", USAGE)
    if kernel != "auto" and not ways[kernel][0]:
        raise CommandError(f"kernel {kernel!r} cannot run on this machine: {ways[kernel][1]}; choose auto")


def check_folder(folder: Path) -> None:
    """Whether files can be written to a folder, which need not exist yet."""
    from falloff.evaluation import files

    try:
        files.check_writable(folder)
    except OSError as error:
        raise CommandError(str(error)) from error
