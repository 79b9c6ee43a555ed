"""Loading a pipeline without its libraries' chatter, and running it with errors in one line."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from falloff.cli.checkpoint import IN_TILES, Checkpoint
from falloff.cli.errors import CommandError, told


@contextmanager
def quiet() -> Iterator[None]:
    """Without the progress bars and warnings of diffusers and transformers, which are not for users of a command."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    chatty = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in chatty]
    for library in chatty:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, level in zip(chatty, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def load(checkpoint: Checkpoint, family: Any = None, *, move: bool = True) -> Any:
    """The pipeline on the GPU in bfloat16 where there is one, else on the CPU in float32.

    ``family``: a pipeline class that diffusers does not know of. ``move``: or leave it on the CPU, in the same type.
    Raises ``CommandError`` when the checkpoint cannot be loaded.
    """
    import torch
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    # autoencoders lose visible detail in bfloat16
    dtypes = {"default": dtype, "vae": torch.float32}
    broken = (OSError, ValueError, RuntimeError, KeyError, AttributeError, SafetensorError)
    with told(*broken, before=f"cannot load {checkpoint.source}: "):
        pipe = (family or DiffusionPipeline).from_pretrained(checkpoint.source, dtype=dtypes)
        if type(getattr(pipe, "vae", None)).__name__ == IN_TILES:
            pipe.vae.enable_tiling()
        return pipe.to(device) if move else pipe


COUNT_LATENT_FRAMES = ("AllegroPipeline",)
"""Pipelines whose transformer tells its own number of frames in those of the latents."""


def size(pipe: Any, call: Mapping[str, Any], name: str) -> int | None:
    """``num_frames``, ``height`` or ``width`` of a pipeline call: as asked, by the default of the pipeline or, as
    CogVideoX has them, of its transformer, or as a pipeline of pictures has them, its own; ``None`` where the pipeline
    finds it otherwise."""
    from falloff.evaluation import generate

    if not generate.takes(pipe, name):
        return None
    of_latents = name != "num_frames" or type(pipe).__name__ in COUNT_LATENT_FRAMES
    axis = "temporal" if name == "num_frames" else "spatial"
    scale = getattr(pipe, f"vae_scale_factor_{axis}", 1) if of_latents else 1
    sample = pipe.transformer.config.get(f"sample_{name.removeprefix('num_')}") or 0
    own = 0 if name == "num_frames" else getattr(pipe, "default_sample_size", 0) * getattr(pipe, "vae_scale_factor", 1)
    found = call.get(name) or generate.default(pipe, name) or scale * sample or own
    return found if isinstance(found, int) and found else None


@contextmanager
def with_lora(pipe: Any, lora: str | None) -> Iterator[None]:
    """The pipeline with a LoRA, where one is given. Raises ``CommandError`` for what is none, or of another model."""
    if lora is None:
        yield
        return
    from falloff.training import adapter

    with adapter.loaded(pipe, lora):
        yield


@contextmanager
def running() -> Iterator[None]:
    """Errors of a pipeline call and of falloff's own checks as one line each."""
    import torch

    from falloff.sanity import OutputError
    from falloff.session import RehearsalError

    try:
        with told(ValueError, TypeError, ArithmeticError, RehearsalError, OutputError):
            yield
    except torch.OutOfMemoryError as error:
        raise CommandError("the device's memory is full; ask for fewer frames or a smaller size") from error
