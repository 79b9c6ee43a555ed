"""A LoRA that makes a model at home in its sparse attention, and in videos longer than it has seen.

After Radial Attention (arXiv:2506.19852, section 4.3): LoRA on the projections of the attention layers, trained with
the sparse attention of the method in forward and backward, so that one tuning teaches both the pattern and the length.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available
from torch import Tensor, nn

from falloff import api
from falloff.evaluation import generate, video
from falloff.hosts import host_for
from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.schedule import Schedule
from falloff.training import adapter, loop
from falloff.training.cache import Size, prepare
from falloff.training.data import usable
from falloff.training.errors import TrainingError
from falloff.training.families import family_of
from falloff.training.length import riflex
from falloff.training.loop import Course
from falloff.training.objective import flow_loss, flow_of, point_at, validation_points

SAMPLES = "samples"
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What to train.

    size: of the videos. trained_frames: of the videos that the model knows. rank: of the LoRA. rope: "plain", or
    "riflex" for its temporal positions (see ``length``). uncaptioned: share of samples that are trained without their
    caption, for guidance. validation: clips kept out for the validation loss. samples: captions of those that a video
    is made of at every check. checkpointing: forget activations and compute them again for the gradient, which needs
    less memory. precision: "bf16" for autocast, "no" for the model's own type.
    """

    size: Size
    trained_frames: int
    rank: int = 128
    rope: Literal["plain", "riflex"] = "plain"
    uncaptioned: float = 0.1
    validation: int = 4
    samples: int = 1
    checkpointing: bool = False
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank} must be at least 1")
        if not 0 <= self.uncaptioned <= 1:
            raise ValueError(f"uncaptioned = {self.uncaptioned} is outside 0.0 to 1.0")
        if not 0 <= self.samples <= self.validation:
            raise ValueError(f"samples = {self.samples} must be 0 to the {self.validation} clips kept for validation")
        for name, legal in (("rope", ("plain", "riflex")), ("precision", ("no", "bf16"))):
            if getattr(self, name) not in legal:
                raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(legal)}")


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
    where latents and text are kept, ``output``/cache unless given.

    Raises ``TrainingError`` before any training when pipeline, videos, output or settings do not fit.
    """
    family, schedule = family_of(pipe), schedule or method.schedule
    call = {**(call or {}), "num_frames": lora.size.frames, "height": lora.size.height, "width": lora.size.width}
    flow = flow_of(pipe, generate.steps(pipe, call))
    clips = usable(videos, lora.size.frames, lambda done, total: progress("looking at clips", done, total))
    train_clips, kept = _split(len(clips), lora.validation, course.seed)
    (output / SAMPLES).mkdir(parents=True, exist_ok=True)
    accelerator = _accelerator(output, lora.precision)
    pipe.to(accelerator.device)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    cached = prepare(
        pipe,
        family,
        clips,
        lora.size,
        call,
        cache or output / "cache",
        share=share,
        on_clip=lambda done, total: progress("encoding clips", done, total),
    )
    accelerator.wait_for_everyone()
    model, device = pipe.transformer, accelerator.device
    identity = {
        "model": type(model).__name__,
        **_plain(method, schedule, lora),
        "sampler steps": len(flow.levels),
        "clips": cached.identity(),
    }

    def loss(number: int, generator: torch.Generator) -> Tensor:
        captioned = bool(torch.rand((), generator=generator) >= lora.uncaptioned)
        index = train_clips[loop.drawn(number, len(train_clips), course.seed)]
        sample = cached.sample(index, device, captioned=captioned)
        return flow_loss(pipe, family, model, flow, point_at(sample, flow.draw(generator), generator))

    def check(step: int) -> dict[str, float]:
        points = validation_points([cached.sample(index, device) for index in kept], course.seed)
        losses = [flow_loss(pipe, family, model, flow, point) for point in points[share]]
        total = accelerator.reduce(torch.stack(losses).sum() if losses else torch.zeros((), device=device), "sum")
        if accelerator.is_main_process:
            for number, index in enumerate(kept[: lora.samples]):
                progress("making samples", 0, 0)
                with _awake(pipe, device):
                    made = generate.generate(pipe, clips[index].caption, seed=course.seed, call_arguments=call)
                video.write(output / SAMPLES / f"step-{step:06d}-{number}.mp4", made.frames_FHWC, fps)
        return {"validation": float(total) / len(points)} if points else {}

    with ExitStack() as left:
        left.enter_context(api.using(pipe, method, schedule=schedule, kernel=kernel))
        left.enter_context(_positions(pipe, lora))
        left.enter_context(_checkpointing(model, lora.checkpointing))
        left.enter_context(_parked(pipe, device))
        parameters = left.enter_context(adapter.adapted(model, lora.rank, course.seed))
        loop.train(
            parameters,
            loss,
            course,
            output,
            accelerator,
            identity=identity,
            check=check,
            on_step=lambda now: progress(f"training, loss {now.loss:.4f}", now.step, course.steps),
        )
        recipe = _recipe(pipe, method, schedule, kernel, lora, course)
        if accelerator.is_main_process:
            adapter.save(pipe, output)
            recipe.save(output / adapter.RECIPE)
    accelerator.end_training()
    return recipe


def _accelerator(output: Path, precision: str) -> Accelerator:
    """With TensorBoard where that is installed."""
    tensorboard = is_tensorboard_available()
    accelerator = Accelerator(
        mixed_precision=precision, log_with="tensorboard" if tensorboard else None, project_dir=str(output)
    )
    if tensorboard:
        accelerator.init_trackers("tensorboard")
    return accelerator


def _split(count: int, validation: int, seed: int) -> tuple[list[int], list[int]]:
    """Clips to train on, and clips to validate on. Raises ``TrainingError`` when nothing is left to train on."""
    if count <= validation:
        raise TrainingError(
            f"{validation} clips are to be kept for validation, and there are {count} in all; give more clips, or keep "
            "fewer of them"
        )
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return sorted(order[validation:]), order[:validation]


def _plain(method: Method, schedule: Schedule, lora: Lora) -> dict[str, Any]:
    """What has to be the same when a training goes on."""
    return {
        "method": method.name,
        "method settings": method.settings(),
        "schedule": asdict(schedule),
        **asdict(lora),
    }


def _grid_frames(pipe: Any, frames: int) -> int:
    """Frames of the transformer's grid for a number of video frames."""
    patch = getattr(pipe.transformer.config, "patch_size", 1)
    latent = (frames - 1) // pipe.vae_scale_factor_temporal + 1
    return int(latent // (patch[0] if isinstance(patch, list | tuple) else 1))


@contextmanager
def _positions(pipe: Any, lora: Lora) -> Iterator[None]:
    if lora.rope == "plain":
        yield
        return
    with riflex(pipe.transformer, _grid_frames(pipe, lora.trained_frames), _grid_frames(pipe, lora.size.frames)):
        yield


@contextmanager
def _checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    before = model.is_gradient_checkpointing
    if wanted and not before:
        model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if wanted and not before:
            model.disable_gradient_checkpointing()


@contextmanager
def _parked(pipe: Any, device: torch.device) -> Iterator[None]:
    """Everything but the transformer out of the device's memory: latents and text are on the disk by now."""
    _move(pipe, torch.device("cpu"))
    try:
        yield
    finally:
        _move(pipe, device)


@contextmanager
def _awake(pipe: Any, device: torch.device) -> Iterator[None]:
    """The whole pipeline on the device for a moment."""
    _move(pipe, device)
    try:
        yield
    finally:
        _move(pipe, torch.device("cpu"))


def _move(pipe: Any, device: torch.device) -> None:
    for part in pipe.components.values():
        if isinstance(part, nn.Module) and part is not pipe.transformer:
            part.to(device)


def _recipe(pipe: Any, method: Method, schedule: Schedule, kernel: str, lora: Lora, course: Course) -> Recipe:
    """The inference that was trained for."""
    model = pipe.transformer
    positions = {
        "rope": lora.rope,
        "grid_frames": _grid_frames(pipe, lora.size.frames),
        "trained_grid_frames": _grid_frames(pipe, lora.trained_frames),
    }
    return Recipe(
        model=type(model).__name__,
        layers=len(host_for(model).attention_paths(model)),
        method=method,
        schedule=schedule,
        kernel=kernel,
        evidence={"trained": "LoRA", **asdict(lora.size), "rank": lora.rank, "steps": course.steps, **positions},
    )
