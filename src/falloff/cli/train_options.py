"""Options and steps that the commands of ``falloff train`` share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from falloff.cli import checkpoint as checkpoints
from falloff.cli import options, pictures, settings
from falloff.cli.errors import USAGE, CommandError, told
from falloff.cli.progress import Steps

if TYPE_CHECKING:
    from falloff.methods.base import Method
    from falloff.schedule import Schedule

Videos = Annotated[
    Path,
    typer.Argument(
        help="Folder of videos, or pictures for a model of those, with a .txt beside each, or a .jsonl, or .tar shards."
    ),
]
Method_ = Annotated[
    str, typer.Option("--method", help="How attention is computed, one of 'falloff methods', or a recipe's .yaml file.")
]
InferenceSteps = Annotated[
    int | None,
    typer.Option(min=1, help="Denoising steps that are tuned for: they tell which stay dense.", show_default=False),
]
Rank = Annotated[int, typer.Option(min=1, help="Of the LoRA.")]
TrainingSteps = Annotated[int, typer.Option("--steps", min=1, help="Steps of training in all.")]
Batch = Annotated[int, typer.Option(min=1, help="Clips a step, over all GPUs.")]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
Ema = Annotated[
    float | None,
    typer.Option(help="Decay of an average of the weights, such as 0.99; none unless given.", show_default=False),
]
Uncaptioned = Annotated[float, typer.Option(help="Share of clips trained without caption, for guidance.")]
Validation = Annotated[int, typer.Option(min=0, help="Clips kept out for the validation loss.")]
Samples = Annotated[int, typer.Option(min=0, help="Of those, clips whose caption a video is made of.")]
CheckEvery = Annotated[int, typer.Option(min=1, help="Steps between validations.")]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between states to go on from.")]
Checkpointing = Annotated[
    bool, typer.Option(help="Compute activations again for the gradient, which needs less memory.")
]
Precision = Annotated[str | None, typer.Option(help="no or bf16; bf16 on a GPU unless given.", show_default=False)]
Seed = Annotated[int, typer.Option(min=0, help="Same seed, same training.")]
CacheFolder = Annotated[
    Path | None, typer.Option(help="Where latents and text are kept; OUTPUT/cache unless given.", show_default=False)
]
Output = Annotated[Path, typer.Option(help="Folder for what is trained; a training there is gone on with.")]


ARGUMENTS = {"frames": "num_frames", "height": "height", "width": "width"}
"""What a pipeline calls the parts of a size."""


@dataclass(frozen=True)
class Bench:
    """A loaded pipeline and what it is to be trained for. ``size``, ``usual``: of the videos, asked for and default,
    where 0 is what the pipeline has no default for."""

    pipe: Any
    method: Method
    schedule: Schedule
    call: Mapping[str, Any]
    size: Mapping[str, int]
    usual: Mapping[str, int]
    fps: float
    progress: Callable[[str, int, int], None]

    @property
    def transformers(self) -> list[Any]:
        """One, or two that share the noise levels."""
        from falloff import api

        return [model for name in api.TRANSFORMERS if (model := getattr(self.pipe, name, None)) is not None]


@contextmanager
def bench(
    model: str | None,
    method: str,
    given: list[str],
    frames: int | None,
    height: int | None,
    width: int | None,
    steps: int | None,
    kernel: str,
    output: Path,
) -> Iterator[Bench]:
    """Everything that can be told before a training is loaded; errors of the training are one line each."""
    chosen = settings.choose(method, given)
    options.check_kernel(kernel)
    options.check_folder(output)
    checkpoint = checkpoints.find(model)
    call = {**checkpoint.defaults, **options.call_arguments(frames, height, width, steps, None)}
    checkpoint.check_size(call)

    from falloff import api
    from falloff.cli import pipeline
    from falloff.recipe import Recipe, RecipeError

    with pipeline.quiet(), Steps(f"loading {checkpoint.name}", unit="", quiet=not _first()) as progress:
        pipe = pipeline.load(checkpoint, move=False)  # of several processes, each has a GPU of its own
        with pipeline.running(), told(OSError, RecipeError):
            way = chosen.method
            if isinstance(way, Recipe):
                api.check_recipe(pipe, way)
                way = way.method
            size, usual = size_of(pipe, call), usual_size(pipe, checkpoint.defaults)
            yield Bench(pipe, way, chosen.schedule, call, size, usual, checkpoint.fps, _shown(progress))


def say(label: str, text: str) -> None:
    """A line of the result."""
    if _first():
        typer.echo(f"{label:<18}{text}")


def say_how_to_use(bench: Bench, model: str | None, output: Path, *, lora: bool) -> None:
    """The command that makes a video with what was trained."""
    given = " --image FILE" if pictures.takes(type(bench.pipe)) else ""
    given += f" --lora {output}" if lora else ""
    say("try it", f"falloff generate PROMPT{given} --method {output / 'recipe.yaml'} {options_of(bench, model)}")


def _first() -> bool:
    """Whether this process is to speak: of those that accelerate or torchrun started, one is."""
    return os.environ.get("RANK", "0") == "0"


def _shown(progress: Steps) -> Callable[[str, int, int], None]:
    """A training's progress, of which the loss changes at every step and is told from time to time."""

    def show(doing: str, done: int, total: int) -> None:
        what, _, detail = doing.partition(", ")
        progress.show(what, done, total, detail)

    return show


def options_of(bench: Bench, model: str | None) -> str:
    """What another command is to be given for videos of the same size by the same model."""
    from falloff.evaluation import generate

    told = {
        name: value
        for name, value in bench.size.items()
        if generate.takes(bench.pipe, ARGUMENTS[name]) and (name == "frames" or value != bench.usual[name])
    }
    given = {**told, **({"model": model} if model else {})}
    return " ".join(f"--{name} {value}" for name, value in given.items())


def precision_of(text: str | None) -> Any:
    """As asked; else half precision where a GPU has it."""
    import torch

    return text or ("bf16" if torch.cuda.is_available() else "no")


def size_of(pipe: Any, call: Mapping[str, Any]) -> dict[str, int]:
    """Frames, height and width of a pipeline call. Raises ``CommandError`` for one that neither tells."""
    found = usual_size(pipe, call)
    for label, value in found.items():
        if not value:
            raise CommandError(f"{type(pipe).__name__} has no size of its own; give --{label}", USAGE)
    return found


def usual_size(pipe: Any, call: Mapping[str, Any]) -> dict[str, int]:
    """Frames, height and width of a pipeline call, or 0; a picture is one frame, unless more are asked for."""
    from falloff.cli import pipeline
    from falloff.evaluation import generate

    found = {label: pipeline.size(pipe, call, name) or call.get(name, 0) for label, name in ARGUMENTS.items()}
    if not generate.takes(pipe, "num_frames"):
        found["frames"] = call.get("num_frames", 1)
    return found
