"""Processes that train on one sample together: each has an even share of its tokens, and during attention of the heads.

This is diffusers' context parallelism with Ulysses (arXiv:2309.14509), through which gradients flow: what a parameter
gets in one process comes of that process's tokens or heads, and the sum over the processes of a team is the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from torch import nn

from falloff.hosts import class_name
from falloff.training.errors import TrainingError
from falloff.training.family import Sample

SERVED = ("WanTransformer3DModel",)
"""Models whose tokens diffusers can share out while they are trained; LTX's mask over text it shares wrongly."""


def check(models: Iterable[Any], team: int, accelerator: Accelerator) -> None:
    """Raise ``TrainingError`` unless teams of so many processes can share the tokens of these models."""
    if accelerator.num_processes % team:
        raise TrainingError(
            f"ulysses = {team} makes no even teams of {accelerator.num_processes} processes; start a multiple of {team}"
        )
    for model in models:
        if class_name(model) not in SERVED:
            raise TrainingError(
                f"the tokens of {class_name(model)} cannot be shared in training, those of {', '.join(SERVED)} can; "
                "leave ulysses at 1"
            )
        heads = model.config.num_attention_heads
        if heads % team:
            raise TrainingError(f"{heads} heads have no even shares for ulysses = {team} processes")


def check_tokens(model: Any, sample: Sample, team: int) -> None:
    """Raise ``TrainingError`` unless a sample's tokens have even shares."""
    frames, height, width = (
        math.ceil(size / patch) for size, patch in zip(sample.latents.shape[-3:], model.config.patch_size, strict=True)
    )
    if frames * height * width % team:
        raise TrainingError(
            f"{frames} x {height} x {width} tokens have no even shares for ulysses = {team} processes; choose another "
            "size"
        )


@contextmanager
def shared_tokens(models: Iterable[Any], team: int, accelerator: Accelerator) -> Iterator[None]:
    """For a while the processes of a team run these models on shares of the tokens; each is given all of the output.

    Teams are of processes in a row. All of a team run a model together, on the same input.
    """
    import torch.distributed as dist
    from diffusers import ContextParallelConfig, ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel, remove_context_parallel

    # Model.enable_parallelism would do all this but for processes without an accelerator, and has no way back
    teams = accelerator.num_processes // team
    mesh = dist.device_mesh.init_device_mesh(
        accelerator.device.type, (teams, 1, team), mesh_dim_names=("teams", "ring", "ulysses")
    )
    own = ContextParallelConfig(ulysses_degree=team, mesh=mesh["ring", "ulysses"])
    config = ParallelConfig(context_parallel_config=own)
    config.setup(accelerator.process_index, accelerator.num_processes, accelerator.device, mesh=own.mesh)
    models = list(models)
    try:
        for model in models:
            _set(model, config)
            apply_context_parallel(model, own, model._cp_plan)
        yield
    finally:
        for model in models:
            _set(model, None)
            remove_context_parallel(model, model._cp_plan)


def _set(model: nn.Module, config: Any) -> None:
    """Where diffusers looks for the parallelism of a model."""
    model._parallel_config = config
    for module in model.modules():
        processor = getattr(module, "processor", None)
        if processor is not None and hasattr(processor, "_parallel_config"):
            processor._parallel_config = config
