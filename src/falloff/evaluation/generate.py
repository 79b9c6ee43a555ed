"""One seeded generation of a diffusers pipeline, timed, with its steps told as they pass."""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from falloff.evaluation import machine
from falloff.evaluation.video import Frames, to_bytes

OnStep = Callable[[], None]
OURS = ("prompt", "generator", "output_type", "return_dict", "callback_on_step_end")
"""Arguments of a pipeline call that are set here."""


class NotFiniteError(ArithmeticError):
    """A model put out NaN or infinity, which a video file would show as black or noise."""


@dataclass(frozen=True)
class Generation:
    """A video uint8 [F, H, W, 3], the seconds its call took, the most memory in use meanwhile, in bytes, and the share
    of the processors that others took, 0 to 1."""

    frames_FHWC: Frames
    seconds: float
    peak_bytes: int | None
    others: float | None


def generate(
    pipe: Any, prompt: str, *, seed: int, call_arguments: Mapping[str, Any], on_step: OnStep | None = None
) -> Generation:
    """Run a pipeline once for one prompt; an image is a video of one frame.

    Raises ``TypeError`` for call arguments that the pipeline does not take or that are set here, and
    ``NotFiniteError`` when what comes out is no picture.
    """
    check_arguments(pipe, call_arguments)
    arguments: dict[str, Any] = dict(call_arguments)
    if on_step is not None and "callback_on_step_end" in _parameters(pipe):

        def after_step(_pipe: Any, _step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
            on_step()
            return {}

        arguments["callback_on_step_end"] = after_step
    device = torch.device(getattr(pipe, "_execution_device", "cpu"))
    generator = torch.Generator("cpu").manual_seed(seed)
    memory = machine.PeakMemory(device)
    machine.synchronize(device)
    others = machine.Others()
    start = time.perf_counter()
    with quiet(pipe):
        output = pipe(prompt=prompt, generator=generator, output_type="np", **arguments)
    machine.synchronize(device)
    seconds, taken = time.perf_counter() - start, others.read()
    video = np.asarray(output.frames[0] if hasattr(output, "frames") else output.images[:1])
    if not np.isfinite(video).all():
        raise NotFiniteError(f"the output for {prompt!r} holds NaN or infinity; try another dtype or kernel")
    return Generation(to_bytes(video), seconds, memory.read(), taken)


def steps(pipe: Any, call_arguments: Mapping[str, Any]) -> int:
    """How many denoising steps a call makes: as asked, or the pipeline's default."""
    return int(call_arguments.get("num_inference_steps", default(pipe, "num_inference_steps")))


def takes(pipe: Any, name: str) -> bool:
    """Whether a pipeline's call has an argument."""
    return name in _parameters(pipe)


def default(pipe: Any, name: str) -> Any:
    """What a pipeline's call takes for an argument that is not given."""
    return _parameters(pipe)[name].default


def recorded(call_arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Call arguments to be written down: a picture in words that are the same for the same pixels, and only then."""
    return {
        name: _in_words(value) if isinstance(value, Image.Image) else value for name, value in call_arguments.items()
    }


def _in_words(picture: Image.Image) -> str:
    pixels = hashlib.sha256(picture.mode.encode() + picture.tobytes()).hexdigest()
    return f"picture of {picture.width} x {picture.height}, SHA-256 {pixels[:16]}"


def check_arguments(pipe: Any, call_arguments: Mapping[str, Any], ours: Iterable[str] = ()) -> None:
    """Raise ``TypeError`` for an argument that the pipeline does not take, or that is not the caller's to set.

    ``ours``: such arguments of one kind of pipeline.
    """
    legal = [name for name in _parameters(pipe) if name not in (*OURS, *ours)]
    for name in call_arguments:
        if name not in legal:
            raise TypeError(f"{type(pipe).__name__} takes no argument {name!r} here; legal are {', '.join(legal)}")


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters


@contextmanager
def quiet(pipe: Any) -> Iterator[None]:
    """Without the pipeline's own progress bar, which would write across ours."""
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = before
