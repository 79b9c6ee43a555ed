"""A LoRA that makes a model at home in its sparse attention, and in videos longer than it has seen.

After Radial Attention (arXiv:2506.19852, section 4.3): LoRA on the projections of the attention layers, trained with
the sparse attention of the method in forward and backward, so that one tuning teaches both the pattern and the length.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.schedule import Schedule
from falloff.training import adapter, loop
from falloff.training.errors import TrainingError
from falloff.training.length import riflex
from falloff.training.loop import Course
from falloff.training.objective import Point, flow_loss
from falloff.training.studio import Lesson, Manner, Progress, Studio, open_studio


@dataclass(frozen=True, kw_only=True)
class Lora(Lesson):
    """A training of a LoRA; see ``Lesson`` for what is common to all.

    trained_frames: of the videos that the model knows. rank: of the LoRA. rope: "plain", or "riflex" for its temporal
    positions (see ``length``). ulysses: processes that share the tokens of every sample (see the module of that name).
    """

    trained_frames: int
    rank: int = 128
    rope: Literal["plain", "riflex"] = "plain"
    ulysses: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "ulysses"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        self.check_choice("rope", ("plain", "riflex"))


def train_lora(
    pipe: Any,
    videos: Path,
    output: Path,
    method: Method,
    lora: Lora,
    course: Course,
    *,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    call: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    fps: float = 16,
    progress: Progress = lambda doing, done, total: None,
) -> Recipe:
    """Train a LoRA of a pipeline on a folder of videos with captions, or go on with the training in ``output``.

    Leaves the LoRA on the pipeline; in ``output`` the weights as ``pipe.load_lora_weights`` reads them, the recipe of
    the inference it was trained for (also returned), a log of JSON lines and sample videos. call: arguments of the
    pipeline call that the LoRA is for; its number of steps tells which noise levels the schedule keeps dense. cache:
    where latents and text are kept, ``output``/cache unless given. fps: of the samples.

    Processes that are started to share the transformers out (see ``sharding``) are left with their shares.

    Raises ``TrainingError`` before any training when pipeline, videos, output or settings do not fit.
    """
    if method.learns:
        raise TrainingError(
            f"{method.name} has parameters of its own to train; use train_sparse (falloff train sparse)"
        )
    manner = Manner(method=method, schedule=schedule or method.schedule, kernel=kernel)
    studio = open_studio(
        pipe,
        videos,
        output,
        manner,
        lora,
        course.seed,
        call=call or {},
        cache=cache,
        fps=fps,
        progress=progress,
        team=lora.ulysses,
    )
    models = studio.models

    def loss_at(point: Point) -> Tensor:
        return flow_loss(studio.velocity(models, point), point)

    def loss(number: int, generator: torch.Generator) -> Tensor:
        return loss_at(studio.point(number, generator))

    def check(step: int) -> dict[str, float]:
        studio.make_samples(step)
        return studio.validation(loss_at)

    frames = studio.grid_frames(lora.trained_frames), studio.grid_frames(lora.size.frames)
    with ExitStack() as left:
        left.enter_context(studio.at_work())
        if lora.rope == "riflex":
            for model in models.values():
                left.enter_context(riflex(model, *frames))
        parameters = left.enter_context(adapter.all_adapted(models, lora.rank, course.seed))
        loop.train(
            parameters,
            loss,
            course,
            output,
            studio.accelerator,
            identity=studio.identity(),
            check=check,
            on_step=lambda now: progress(f"training, loss {now.loss:.4f}", now.step, course.steps),
            half=lora.precision == "bf16",
            share=studio.share,
            team=lora.ulysses,
        )
        return _written(studio, lora, course, frames)


def _written(studio: Studio, lora: Lora, course: Course, frames: tuple[int, int]) -> Recipe:
    """The LoRA and its recipe in the output folder."""
    trained, new = frames
    recipe = studio.recipe("LoRA", course, rank=lora.rank, rope=lora.rope, trained_grid_frames=trained, grid_frames=new)
    if studio.accelerator.is_main_process:
        adapter.save(studio.pipe, studio.output)
        recipe.save(studio.output / adapter.RECIPE)
    studio.accelerator.end_training()
    return recipe
