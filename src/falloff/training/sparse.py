"""Fine-tuning a model to a method that learns: its branches, and the backbone around them.

The aim is either the dense model itself, whose velocity for the same noised latent is matched (as TurboDiffusion tunes
SLA), or the data, by flow matching (as SLA, arXiv:2509.24006, and VSA, arXiv:2505.13389, were tuned). Sparsity may be
raised step by step, so that the model is never far from what it knows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from falloff import api
from falloff.hosts import standing as seam
from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.schedule import Schedule
from falloff.training import adapter, loop
from falloff.training.errors import TrainingError
from falloff.training.loop import Course
from falloff.training.objective import Point, flow_loss
from falloff.training.studio import Lesson, Manner, Progress, Studio, open_studio

BRANCHES, TRANSFORMER = "branches.safetensors", "transformer"
RISE = 0.03
"""Sparsity gained at every stage of a ramp, as VSA was adapted."""


@dataclass(frozen=True, kw_only=True)
class Sparse(Lesson):
    """A training of a method's branches; see ``Lesson`` for what is common to all.

    backbone: what is trained besides: a "lora" of ``rank`` on the self-attention, the "full" transformer, or "none".
    aim: "velocity" of the frozen dense model, or "flow" matching on the data. ramp: steps after which sparsity rises
    by 0.03, from none to the method's own; 0 for the method's own from the start.
    """

    backbone: Literal["lora", "full", "none"] = "lora"
    rank: int = 128
    aim: Literal["velocity", "flow"] = "velocity"
    ramp: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("backbone", ("lora", "full", "none"))
        self.check_choice("aim", ("velocity", "flow"))
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1")
        if self.ramp < 0:
            raise ValueError(f"ramp = {self.ramp} must be a number of steps, or 0 for no ramp")


def train_sparse(
    pipe: Any,
    videos: Path,
    output: Path,
    method: Method,
    sparse: Sparse,
    course: Course,
    *,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    call: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    fps: float = 16,
    progress: Progress = lambda doing, done, total: None,
) -> Recipe:
    """Fine-tune a pipeline to a method, or go on with the training in ``output``; arguments as of ``train_lora``.

    Leaves a LoRA or the tuned weights on the pipeline, and in ``output`` the recipe of what was trained for (also
    returned), with which ``enable`` loads what the method learned; the LoRA as ``pipe.load_lora_weights`` reads it, or
    the whole transformer; a log of JSON lines and sample videos.

    Raises ``TrainingError`` before any training when pipeline, videos, output or settings do not fit.
    """
    _check(pipe, method, sparse)
    manner = Manner(method=method, schedule=schedule or method.schedule, kernel=kernel)
    studio = open_studio(
        pipe, videos, output, manner, sparse, course.seed, call=call or {}, cache=cache, fps=fps, progress=progress
    )
    model = pipe.transformer
    copied = sparse.aim == "velocity" and sparse.backbone == "full"
    teacher = copy.deepcopy(model).requires_grad_(False) if copied else model

    def loss_at(point: Point) -> Tensor:
        if sparse.aim == "flow":
            return flow_loss(studio.velocity(model, point), point)
        with torch.no_grad(), _dense(teacher):
            wanted = studio.velocity(teacher, point)
        return mse_loss(studio.velocity(model, point), wanted)

    def loss(number: int, generator: torch.Generator) -> Tensor:
        seam.replan(model, eased(method, number // course.batch, sparse.ramp))
        return loss_at(studio.point(number, generator))

    def check(step: int) -> dict[str, float]:
        seam.replan(model, method)
        studio.make_samples(step)
        return studio.validation(loss_at)

    with ExitStack() as left:
        left.enter_context(studio.at_work())
        parameters = left.enter_context(_backbone(model, sparse, course.seed))
        if method.learns:
            learned = api.branches(pipe)["0"].named_parameters()
            parameters = {**parameters, **{f"branches.{name}": parameter for name, parameter in learned}}
        loop.train(
            parameters,
            loss,
            course,
            output,
            studio.accelerator,
            identity=studio.identity(),
            check=check,
            on_step=lambda now: progress(f"training, loss {now.loss:.4f}", now.step, course.steps),
            half=sparse.precision == "bf16",
        )
        return _written(studio, sparse, course)


def eased(method: Method, step: int, ramp: int) -> Method:
    """The method as sparse as it is to be at a step of the training."""
    if not ramp:
        return method
    reached, wanted = RISE * (step // ramp), method.settings()
    if "sparsity" in wanted:
        return replace(method, sparsity=min(wanted["sparsity"], reached))  # type: ignore[call-arg]  # as just seen
    return replace(method, density=max(wanted["density"], 1 - reached))  # type: ignore[call-arg]  # as was checked


def _check(pipe: Any, method: Method, sparse: Sparse) -> None:
    if sparse.backbone == "none" and not method.learns:
        raise TrainingError(f"{method.name} learns nothing, so that nothing is left to train without the backbone")
    if sparse.ramp and not {"density", "sparsity"} & method.settings().keys():
        raise TrainingError(f"{method.name} has no density or sparsity that a ramp could change; leave the ramp out")
    if sparse.backbone == "full" and pipe.transformer.dtype != torch.float32:
        raise TrainingError(
            f"all weights are to be trained, and in {pipe.transformer.dtype} small steps would be lost; load the "
            "transformer in float32 and compute with precision='bf16'"
        )


@contextmanager
def _backbone(model: Any, sparse: Sparse, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """What is trained of the model itself, all else being frozen meanwhile."""
    if sparse.backbone == "lora":
        with adapter.adapted(model, sparse.rank, seed) as parameters:
            yield parameters
        return
    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(sparse.backbone == "full")
    try:
        yield dict(model.named_parameters()) if sparse.backbone == "full" else {}
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)


@contextmanager
def _dense(model: Any) -> Iterator[None]:
    """The model as it was: dense, and without its LoRA."""
    adapted = adapter.NAME in getattr(model, "peft_config", {})
    if adapted:
        model.disable_adapters()
    try:
        with seam.dense(model, "teacher"):
            yield
    finally:
        if adapted:
            model.enable_adapters()


def _written(studio: Studio, sparse: Sparse, course: Course) -> Recipe:
    """What was trained, and its recipe, in the output folder."""
    learned = str(studio.output / BRANCHES) if studio.manner.method.learns else None
    recipe = studio.recipe(sparse.backbone, course, learned, aim=sparse.aim, ramp=sparse.ramp)
    if studio.accelerator.is_main_process:
        if studio.manner.method.learns:
            api.save_branches(studio.pipe, studio.output / BRANCHES)
        if sparse.backbone == "lora":
            adapter.save(studio.pipe, studio.output)
        if sparse.backbone == "full":
            studio.pipe.transformer.save_pretrained(studio.output / TRANSFORMER)
        recipe.save(studio.output / adapter.RECIPE)
    studio.accelerator.end_training()
    return recipe
