"""What every training of a pipeline needs: its clips as latents, points to learn from, validation and samples."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, is_tensorboard_available
from torch import Tensor, nn

from falloff import api
from falloff.evaluation import generate, video
from falloff.hosts import class_name
from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.schedule import Schedule
from falloff.training import loop, sharding, ulysses
from falloff.training.cache import Cache, Size, picture, prepare
from falloff.training.data import Clip, read_frames, usable
from falloff.training.errors import TrainingError
from falloff.training.families import family_of
from falloff.training.family import Family
from falloff.training.noising import Noising, noising_of
from falloff.training.objective import Point, point_at, validation_points, velocity

SAMPLES = "samples"
SIZE = ("num_frames", "height", "width")
"""What pipeline calls name the parts of a size."""
PATIENCE = timedelta(days=1)
"""How long processes wait for one another: a sample is a whole video, made by one while all others wait."""
SERVED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP)
"""Ways to run: every process has the whole model, or a share of it."""
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is, and of how much."""


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What is common to all trainings.

    size: of the videos. uncaptioned: share of samples that are trained without their caption, for guidance.
    validation: clips kept out for the validation loss. samples: captions of those that a video is made of at every
    check. checkpointing: forget activations and compute them again for the gradient, which needs less memory.
    precision: "bf16" for autocast, "no" for the model's own type.
    """

    size: Size
    uncaptioned: float = 0.1
    validation: int = 4
    samples: int = 1
    checkpointing: bool = False
    precision: Literal["no", "bf16"] = "no"

    def __post_init__(self) -> None:
        if not 0 <= self.uncaptioned <= 1:
            raise ValueError(f"uncaptioned = {self.uncaptioned} is outside 0.0 to 1.0")
        if not 0 <= self.samples <= self.validation:
            raise ValueError(
                f"samples = {self.samples} must be 0 to the {self.validation} clips kept for validation; make fewer "
                "samples, or keep more clips"
            )
        self.check_choice("precision", ("no", "bf16"))

    def check_choice(self, name: str, legal: tuple[str, ...]) -> None:
        """Raise ``ValueError`` unless a setting is one of these."""
        if getattr(self, name) not in legal:
            raise ValueError(f"{name} = {getattr(self, name)!r} must be one of {', '.join(legal)}")


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How a model is to compute, in training as afterwards: a method, what stays dense, and the kernel."""

    method: Method
    schedule: Schedule
    kernel: str = "auto"


@dataclass(frozen=True, kw_only=True)
class Studio:
    """A pipeline with its clips in the cache, those to train on and those kept out."""

    pipe: Any
    family: Family
    noising: Noising
    manner: Manner
    lesson: Lesson
    call: Mapping[str, Any]
    seed: int
    accelerator: Accelerator
    clips: list[Clip]
    cache: Cache
    lessons: list[int]
    """Numbers of the clips to train on."""
    exams: list[int]
    """Numbers of the clips kept out."""
    sharded: bool
    """Whether processes share the transformers out, and have to run them together: see ``sharding``."""
    team: int
    """Processes that share the tokens of every sample, and have to run the transformers together: see ``ulysses``."""
    output: Path
    fps: float
    progress: Progress

    def point(self, number: int, generator: torch.Generator, *, planned: bool = False) -> Point:
        """What sample ``number`` of the training is; ``planned``: at a step that the schedule does not keep dense."""
        captioned, level = self._drawn(generator, planned)
        index = self.lessons[loop.drawn(number, len(self.lessons), self.seed)]
        sample = self.cache.sample(index, self.accelerator.device, captioned=captioned)
        return point_at(sample, self.noising, level, generator)

    def share(self, numbers: Sequence[int], *, planned: bool = False) -> list[tuple[int, bool]]:
        """Of the samples of a step those that this process takes, and whether each counts; ``planned`` as above."""
        return self._own(numbers, lambda number: self._drawn(loop.chance(self.seed, number), planned)[1])

    def _drawn(self, generator: torch.Generator, planned: bool) -> tuple[bool, float]:
        """Whether a sample has its caption, and its noise level."""
        captioned = bool(torch.rand((), generator=generator) >= self.lesson.uncaptioned)
        level = self.noising.draw(generator)
        while planned and self._stays_dense(level):
            level = self.noising.draw(generator)
        return captioned, level

    def _own(self, items: Sequence[loop.Item], level: Callable[[loop.Item], float]) -> list[tuple[loop.Item, bool]]:
        """This process's part of some work, each item at a noise level; and whether it counts, see ``sharding``."""
        if not self.sharded:
            return loop.evenly(self.accelerator, items, self.team)
        models = [self.noising.expert(level(item)) for item in items]
        return sharding.in_step(self.accelerator, items, models, self.team)

    def _stays_dense(self, level: float) -> bool:
        at = self.noising.position(level)
        assert at.step is not None
        assert at.steps is not None
        return self.manner.schedule.step_reason(at.step, at.steps) is not None

    @property
    def models(self) -> dict[str, Any]:
        """The transformers that are trained, by the pipeline's names for them."""
        return {expert: getattr(self.pipe, expert) for expert in self.noising.ranges}

    def velocity(self, models: Mapping[str, Any], point: Point) -> Tensor:
        """What the pipeline's transformers, or copies of them, take for the velocity."""
        model = models[self.noising.expert(point.level)]
        return velocity(self.pipe, self.family, model, point, self.call)

    def validation(self, loss: Callable[[Point], Tensor]) -> dict[str, float]:
        """The mean loss of the clips kept out, and of two transformers each one's own, shared between the processes;
        nothing where there are no such clips."""
        device = self.accelerator.device
        points = validation_points([self.cache.sample(index, device) for index in self.exams], self.noising, self.seed)
        if not points:
            return {}
        mine, experts = self._own(points, lambda point: point.level), list(self.noising.ranges)
        losses = torch.zeros(len(experts), device=device)
        for done, (point, counts) in enumerate(mine, 1):
            value = loss(point)
            if counts:
                losses[experts.index(self.noising.expert(point.level))] += value
            self.progress("validating", done, len(mine))
        means = self.accelerator.reduce(losses, "sum") * len(experts) / len(points) / self.team
        own = dict(zip(experts, means.tolist(), strict=True)) if len(experts) > 1 else {}
        return {"validation": float(means.mean()), **{f"validation {expert}": mean for expert, mean in own.items()}}

    def make_samples(self, step: int) -> None:
        """Videos or pictures of captions kept out, written by the main process, and made by it alone unless models or
        tokens are shared out."""
        if not (self.sharded or self.team > 1 or self.accelerator.is_main_process):
            return
        for number, index in enumerate(self.exams[: self.lesson.samples]):
            self.progress("making samples", 0, 0)
            clip, call = self.clips[index], dict(self.call)
            for name in SIZE:  # which some take from the picture, or make one frame alone
                if not generate.takes(self.pipe, name):
                    del call[name]
            if self.family.image is not None:
                call["image"] = picture(read_frames(clip, 1, self.lesson.size.height, self.lesson.size.width))
            with _moved(self.pipe, self.accelerator.device, back=torch.device("cpu")):
                made = generate.generate(self.pipe, clip.caption, seed=self.seed, call_arguments=call)
            if self.accelerator.is_main_process:
                self._keep(made.frames_FHWC, f"step-{step:06d}-{number}")

    def _keep(self, frames_FHWC: video.Frames, name: str) -> None:
        """A sample, as a picture where the pipeline makes those."""
        suffix = ".mp4" if generate.takes(self.pipe, "num_frames") else ".png"
        video.write((self.output / SAMPLES / name).with_suffix(suffix), frames_FHWC, self.fps)

    def grid_frames(self, frames: int) -> int:
        """Frames of the transformer's grid for a number of video frames."""
        config = self.pipe.transformer.config
        patch = config.get("patch_size", 1)
        patched = patch[0] if isinstance(patch, list | tuple) else config.get("patch_size_t") or 1
        latent = (frames - 1) // self.family.temporal(self.pipe) + 1
        return -(-latent // int(patched))

    def identity(self) -> dict[str, Any]:
        """What has to be the same when a training goes on."""
        return {
            "model": class_name(self.pipe.transformer),
            "method": self.manner.method.name,
            "method settings": self.manner.method.settings(),
            "schedule": asdict(self.manner.schedule),
            "sampler steps": len(self.noising.levels),
            "boundary": self.noising.boundary or None,
            "clips": self.cache.identity(),
            **asdict(self.lesson),
        }

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The model with its sparse attention; everything else is out of the device's memory, being on the disk."""
        with ExitStack() as left:
            if self.sharded:
                left.enter_context(sharding.quiet())
            left.enter_context(_moved(self.pipe, torch.device("cpu"), back=self.accelerator.device))
            if self.team > 1:
                left.enter_context(ulysses.shared_tokens(self.models.values(), self.team, self.accelerator))
            manner = self.manner
            left.enter_context(api.using(self.pipe, manner.method, schedule=manner.schedule, kernel=manner.kernel))
            if self.lesson.checkpointing:
                for model in self.models.values():
                    left.enter_context(_checkpointing(model))
            yield

    def recipe(self, trained: str, course: loop.Course, branches: str | None = None, **more: Any) -> Recipe:
        """The inference that was trained for."""
        model, layers = api.identities(self.pipe)[0]  # of two, both are alike
        return Recipe(
            model=model,
            layers=layers,
            method=self.manner.method,
            schedule=self.manner.schedule,
            kernel=self.manner.kernel,
            evidence={"trained": trained, **asdict(self.lesson.size), "steps": course.steps, **more},
            branches=branches,
        )


def open_studio(
    pipe: Any,
    videos: Path,
    output: Path,
    manner: Manner,
    lesson: Lesson,
    seed: int,
    *,
    call: Mapping[str, Any],
    cache: Path | None,
    fps: float,
    progress: Progress,
    team: int = 1,
) -> Studio:
    """Look over pipeline and clips, and encode what is not in the cache yet. ``team``: see ``Studio``.

    Raises ``TrainingError`` with all that does not fit, and leaves nothing behind then but what is in the cache.
    """
    family = family_of(pipe)
    call = _sized(pipe, call, lesson.size)
    if (reason := family.unfit(pipe, call)) is not None:
        raise TrainingError(f"{type(pipe).__name__} cannot be trained on this size: {reason}")
    noising = noising_of(pipe, family, generate.steps(pipe, call), call)
    clips = usable(videos, lesson.size.frames, lambda done, total: progress("looking at clips", done, total))
    lessons, exams = _split(len(clips), lesson.validation, seed)
    accelerator = _accelerator(output)
    if team > 1:
        ulysses.check(sharding.transformers(pipe), team, accelerator)
    (output / SAMPLES).mkdir(parents=True, exist_ok=True)
    if is_tensorboard_available():
        accelerator.init_trackers("tensorboard")
    _move_in(pipe, accelerator)
    cached = prepare(
        pipe,
        family,
        clips,
        lesson.size,
        call,
        cache or output / "cache",
        share=slice(accelerator.process_index, None, accelerator.num_processes),
        on_clip=lambda done, total: progress("encoding clips", done, total),
    )
    accelerator.wait_for_everyone()
    if team > 1:
        ulysses.check_tokens(pipe.transformer, cached.sample(0, torch.device("cpu")), team)
    return Studio(
        pipe=pipe,
        family=family,
        noising=noising,
        manner=manner,
        lesson=lesson,
        call=call,
        seed=seed,
        accelerator=accelerator,
        clips=clips,
        cache=cached,
        lessons=lessons,
        exams=exams,
        sharded=sharding.asked(),
        team=team,
        output=output,
        fps=fps,
        progress=progress,
    )


def _sized(pipe: Any, call: Mapping[str, Any], size: Size) -> dict[str, Any]:
    """The call for a size. Raises ``TrainingError`` where the pipeline makes pictures and is to be trained on more than
    one frame."""
    if size.frames != 1 and not generate.takes(pipe, "num_frames"):
        raise TrainingError(f"{type(pipe).__name__} makes pictures, and {size.frames} frames are asked for; give 1")
    return {**call, **dict(zip(SIZE, (size.frames, size.height, size.width), strict=True))}


def _accelerator(output: Path) -> Accelerator:
    """With TensorBoard where that is installed. Raises ``TrainingError`` for a launch that cannot be followed."""
    accelerator = Accelerator(
        log_with="tensorboard" if is_tensorboard_available() else None,
        project_dir=str(output),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if accelerator.distributed_type not in SERVED:
        raise TrainingError(
            f"accelerate was started with {accelerator.distributed_type.value}; start it with --multi_gpu, or where a "
            "process cannot hold the whole model with --use_fsdp --fsdp_version 2"
        )
    if sharding.asked():
        sharding.check(accelerator)
    return accelerator


def _move_in(pipe: Any, accelerator: Accelerator) -> None:
    """Onto the device; transformers that are shared out only by the share of this process."""
    if not sharding.asked():
        pipe.to(accelerator.device)
        return
    sharding.check_weights(pipe, accelerator)
    sharding.shard(sharding.transformers(pipe), accelerator)
    for part in _others(pipe):
        part.to(accelerator.device)


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


@contextmanager
def _checkpointing(model: Any) -> Iterator[None]:
    before = model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if not before:
            model.disable_gradient_checkpointing()


@contextmanager
def _moved(pipe: Any, device: torch.device, *, back: torch.device) -> Iterator[None]:
    """Everything but the transformers on another device for a while."""
    parts = _others(pipe)
    for part in parts:
        part.to(device)
    try:
        yield
    finally:
        for part in parts:
            part.to(back)


def _others(pipe: Any) -> list[nn.Module]:
    """All models of a pipeline but its transformers."""
    named = pipe.components.items()
    return [part for name, part in named if isinstance(part, nn.Module) and name not in api.TRANSFORMERS]
