"""Fine-tuning a model to a method that learns: its branches, and the backbone around them.

The aim is the dense model itself, whose velocity for the same noised latent is matched (as TurboDiffusion tunes SLA),
or the data, by flow matching (as SLA, arXiv:2509.24006, and VSA, arXiv:2505.13389, were tuned). Sparsity may be raised
step by step, so that the model is never far from what it knows.

Before either, what the method has learned may be fitted by itself, layer by layer, to the output of dense attention
(as SLA2, arXiv:2602.12675, begins): per-layer output distillation, a first stage that is a start for the second.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from falloff import api
from falloff.branch_file import BranchError
from falloff.evaluation import generate
from falloff.hosts import standing as seam
from falloff.hosts.fitting import output_error
from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.schedule import Schedule
from falloff.training import adapter, loop, sharding
from falloff.training.errors import TrainingError
from falloff.training.families import family_of
from falloff.training.loop import Course
from falloff.training.noising import FIRST
from falloff.training.objective import Point, flow_loss
from falloff.training.studio import Lesson, Manner, Progress, Studio, open_studio

BRANCHES = "branches.safetensors"
RISE = 0.03
"""Sparsity gained at every stage of a ramp, as VSA was adapted."""


@dataclass(frozen=True, kw_only=True)
class Sparse(Lesson):
    """A training of a method's branches; see ``Lesson`` for what is common to all.

    backbone: what is trained besides: a "lora" of ``rank`` on the self-attention, the "full" transformer, or "none".
    aim: "velocity" of the frozen dense model, "flow" matching on the data, or the "output" of dense attention in every
    layer, for which the backbone is "none". ramp: steps after which sparsity rises by 0.03, from none to the method's
    own; 0 for the method's own from the start.
    """

    backbone: Literal["lora", "full", "none"] = "lora"
    rank: int = 128
    aim: Literal["velocity", "flow", "output"] = "velocity"
    ramp: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("backbone", ("lora", "full", "none"))
        self.check_choice("aim", ("velocity", "flow", "output"))
        if self.aim == "output" and self.backbone != "none":
            raise ValueError(
                f"aim = 'output' fits what a method learns to the model's own dense attention, and backbone = "
                f"{self.backbone!r} would change the model meanwhile; set backbone = 'none'"
            )
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
    start: Path | None = None,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    call: Mapping[str, Any] | None = None,
    cache: Path | None = None,
    fps: float = 16,
    progress: Progress = lambda doing, done, total: None,
) -> Recipe:
    """Fine-tune a pipeline to a method, or go on with the training in ``output``; arguments as of ``train_lora``.

    start: the output of an earlier training without a backbone, or a file that ``falloff.load_branches`` reads: what
    the method has learned begins as it is there.

    Leaves a LoRA or the tuned weights on the pipeline, and in ``output`` the recipe of what was trained for (also
    returned), with which ``enable`` loads what the method learned; the LoRA as ``pipe.load_lora_weights`` reads it, or
    the whole transformer; a log of JSON lines and sample videos.

    Raises ``TrainingError`` before any training when pipeline, videos, output or settings do not fit.
    """
    manner = Manner(method=method, schedule=schedule or method.schedule, kernel=kernel)
    _check(pipe, manner, sparse, call or {})
    begun = _begun(pipe, manner, start, output)
    studio = open_studio(
        pipe, videos, output, manner, sparse, course.seed, call=call or {}, cache=cache, fps=fps, progress=progress
    )
    models = studio.models
    copied = sparse.aim == "velocity" and sparse.backbone == "full"
    teachers = {
        expert: copy.deepcopy(model).requires_grad_(False) if copied else model for expert, model in models.items()
    }

    def loss_at(point: Point) -> Tensor:
        expert = studio.noising.expert(point.level)
        if sparse.aim == "output":
            return output_error(models[expert], lambda: studio.velocity(models, point))
        if sparse.aim == "flow":
            return flow_loss(studio.velocity(models, point), point)
        with torch.no_grad(), _dense(teachers[expert]):
            wanted = studio.velocity(teachers, point)
        return mse_loss(studio.velocity(models, point), wanted)

    def loss(number: int, generator: torch.Generator) -> Tensor:
        seam.replan(pipe.transformer, eased(method, number // course.batch, sparse.ramp))
        value = loss_at(studio.point(number, generator, planned=sparse.backbone == "none"))
        if not value.requires_grad:
            raise TrainingError(f"no layer ran as {method.name}, so that nothing is learned: {_reasons(pipe)}")
        return value

    def check(step: int) -> dict[str, float]:
        seam.replan(pipe.transformer, method)
        studio.make_samples(step)
        return studio.validation(loss_at)

    with ExitStack() as left:
        left.enter_context(studio.at_work())
        parameters = left.enter_context(_backbone(models, sparse, course.seed))
        if method.learns:
            parameters = {**parameters, **_learned(pipe, models, begun, everything=sparse.aim == "output")}
        loop.train(
            parameters,
            loss,
            course,
            output,
            studio.accelerator,
            identity={**studio.identity(), "start": begun and _content(api.branches(pipe))},
            check=check,
            on_step=lambda now: progress(f"training, loss {now.loss:.4f}", now.step, course.steps),
            half=sparse.precision == "bf16",
            share=lambda numbers: studio.share(numbers, planned=sparse.backbone == "none"),
        )
        return _written(studio, sparse, course, begun)


def eased(method: Method, step: int, ramp: int) -> Method:
    """The method as sparse as it is to be at a step of the training."""
    if not ramp:
        return method
    reached, wanted = RISE * (step // ramp), method.settings()
    if "sparsity" in wanted:
        return replace(method, sparsity=min(wanted["sparsity"], reached))  # type: ignore[call-arg]  # as just seen
    return replace(method, density=max(wanted["density"], 1 - reached))  # type: ignore[call-arg]  # as was checked


def _check(pipe: Any, manner: Manner, sparse: Sparse, call: Mapping[str, Any]) -> None:
    method, schedule = manner.method, manner.schedule
    family_of(pipe)
    if sparse.backbone == "full" and sharding.asked():
        raise TrainingError(
            "all weights are to be trained, and what processes share out (--use_fsdp) stays frozen; train a LoRA with "
            "backbone='lora', or start with --multi_gpu where every process has room for all"
        )
    if sparse.backbone == "none" and not method.learns:
        raise TrainingError(f"{method.name} learns nothing as it is set; without a backbone nothing is left to train")
    if sparse.ramp and not {"density", "sparsity"} & method.settings().keys():
        raise TrainingError(f"{method.name} has no density or sparsity that a ramp could change; leave the ramp out")
    types = {part.dtype for name in api.TRANSFORMERS if (part := getattr(pipe, name, None)) is not None}
    if sparse.backbone == "full" and (small := types - {torch.float32}):
        raise TrainingError(
            f"all weights are to be trained, and in {small.pop()} small steps would be lost; load the "
            "transformer in float32 and compute with precision='bf16'"
        )
    (_, layers), steps = api.identities(pipe)[0], generate.steps(pipe, call)
    every_layer = set(range(layers)) <= set(schedule.dense_of(layers))
    if every_layer or all(schedule.step_reason(step, steps) is not None for step in range(steps)):
        raise TrainingError(
            f"{schedule} keeps all {layers} layers or all {steps} steps dense, so that {method.name} has nothing to do"
        )


def _reasons(pipe: Any) -> str:
    """Why calls of the last forward stayed dense."""
    return ", ".join(api.report(pipe).reasons)


@contextmanager
def _backbone(models: Mapping[str, Any], sparse: Sparse, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """What is trained of the models themselves, all else being frozen meanwhile."""
    if sparse.backbone == "lora":
        with adapter.all_adapted(models, sparse.rank, seed) as parameters:
            yield parameters
        return
    own: dict[str, nn.Parameter] = {}
    for expert, model in models.items():
        own.update(adapter.of_expert(expert, dict(model.named_parameters())))
    before = {parameter: parameter.requires_grad for parameter in own.values()}
    for parameter in own.values():
        parameter.requires_grad_(sparse.backbone == "full")
    try:
        yield own if sparse.backbone == "full" else {}
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


def _begun(pipe: Any, manner: Manner, start: Path | None, output: Path) -> Path | None:
    """The file to start from. Raises ``TrainingError`` unless it is one for this pipeline and method."""
    if start is None:
        return None
    if not manner.method.learns:
        raise TrainingError(f"{manner.method.name} learns nothing as it is set that could start from {start}")
    if start.is_dir() and start.resolve() == output.resolve():
        raise TrainingError(f"{output} cannot be both start and output; give another folder for the output")
    file = start / BRANCHES if start.is_dir() else start
    if not file.is_file():
        raise TrainingError(f"there is nothing to start from at {file}; give a folder with {BRANCHES}, or such a file")
    if around := [name for name in (adapter.WEIGHTS, FIRST) if start.is_dir() and (start / name).exists()]:
        raise TrainingError(
            f"what {start} holds was trained together with {around[0]}, which a start leaves out; start from a "
            f"training with backbone='none', or give {file} to start from it alone"
        )
    with api.using(pipe, manner.method, schedule=manner.schedule, kernel=manner.kernel):
        _load(pipe, file)
    return file


def _load(pipe: Any, file: Path) -> None:
    try:
        api.load_branches(pipe, file)
    except (BranchError, OSError) as error:
        raise TrainingError(f"cannot start as asked: {error}") from error


def _content(modules: nn.Module) -> str:
    """Changes with any of the numbers in modules; their file is not the same when it is written again."""
    content = hashlib.sha256()
    for name, tensor in modules.state_dict().items():
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()[:32]


def _learned(pipe: Any, models: Mapping[str, Any], begun: Path | None, *, everything: bool) -> dict[str, nn.Parameter]:
    """What is to be trained of what the method learns: ``everything``, or what it does not keep frozen."""
    if begun is not None:
        _load(pipe, begun)
    found: dict[str, nn.Parameter] = {}
    for expert, branches in zip(models, api.branches(pipe).values(), strict=False):  # one may be at no work
        if everything:
            branches.requires_grad_(True)
        own = {f"branches.{name}": p for name, p in branches.named_parameters() if p.requires_grad}
        found.update(adapter.of_expert(expert, own))
    return found


def _written(studio: Studio, sparse: Sparse, course: Course, begun: Path | None) -> Recipe:
    """What was trained, and its recipe, in the output folder."""
    learned = str(studio.output / BRANCHES) if studio.manner.method.learns else None
    started = {} if begun is None else {"start": str(begun)}
    recipe = studio.recipe(sparse.backbone, course, learned, aim=sparse.aim, ramp=sparse.ramp, **started)
    if studio.accelerator.is_main_process:
        if studio.manner.method.learns:
            api.save_branches(studio.pipe, studio.output / BRANCHES)
        if sparse.backbone == "lora":
            adapter.save(studio.pipe, studio.output)
        if sparse.backbone == "full":
            for expert, model in studio.models.items():
                model.save_pretrained(studio.output / expert)
        recipe.save(studio.output / adapter.RECIPE)
    studio.accelerator.end_training()
    return recipe
