"""``falloff bench``: how fast attention kernels and whole transformers are here, and what is common to both."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from falloff.cli import options
from falloff.cli.errors import USAGE, CommandError

if TYPE_CHECKING:
    import torch

    from falloff.evaluation.bench.models import TrueModel
    from falloff.evaluation.bench.shapes import Shape

MINIATURE = "miniature"
DTYPES = ("float32", "bfloat16", "float16")

Rounds = Annotated[int, typer.Option(min=1, help="Interleaved repetitions; times are their medians.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; torch's own unless given.", show_default=False)]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda or cuda:N. A GPU where there is one unless given.", show_default=False)
]
Output = Annotated[Path | None, typer.Option(help="JSON file for all figures.", show_default=False)]

app = typer.Typer(
    help="Measure speed on this machine, against the fastest dense attention present.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def device_of(text: str | None, threads: int | None) -> torch.device:
    """The device to measure on, with the number of threads set. Raises ``CommandError`` for one not there."""
    import torch

    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    name, _, number = text.partition(":")
    if name not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise CommandError(f"--device {text!r} must be cpu, cuda or cuda:N", USAGE)
    if name == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {text}: torch finds {torch.cuda.device_count()} CUDA devices here; take cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(number or 0))  # events that time work belong to the current device
    return torch.device(name, int(number or 0))


def check_dtype(name: str) -> None:
    if name not in DTYPES:
        raise CommandError(f"--dtype {name!r} must be one of {', '.join(DTYPES)}", USAGE)


def default_dtype(device: torch.device) -> str:
    return "bfloat16" if device.type == "cuda" else "float32"


def default_shape(device: torch.device) -> str:
    return "wan14b-720p" if device.type == "cuda" else MINIATURE


@contextmanager
def quiet() -> Iterator[None]:
    """Without warnings of libraries, and with a full device told in one line."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except torch.OutOfMemoryError as error:
        raise CommandError("the device's memory is full; take a smaller --shape") from error


def check_output(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir():
        raise CommandError(f"--output {path} is a folder; give a file to write", USAGE)
    options.check_folder(path.parent)


def shapes() -> dict[str, Shape]:
    """Every shape by name, the bundled miniature's at its default size included."""
    from falloff.evaluation.bench.shapes import SHAPES, on_grid
    from falloff.geometry import Grid

    return {MINIATURE: on_grid(MINIATURE, 4, 32, Grid(17, 16, 16)), **SHAPES}


def models() -> dict[str, TrueModel]:
    """Every transformer by the name of its shape, the bundled miniature's included."""
    from falloff import miniature
    from falloff.evaluation.bench.models import MODELS, WAN, TrueModel

    folder = miniature.path()
    saved = json.loads((folder / "transformer" / "config.json").read_text())
    config = {name: value for name, value in saved.items() if not name.startswith("_")}
    text = json.loads((folder / "generation.json").read_text())["max_sequence_length"]
    return {MINIATURE: TrueModel(shape=shapes()[MINIATURE], kind=WAN, config=config, text=text), **MODELS}
