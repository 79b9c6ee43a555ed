"""Sharded training (FSDP): each process holds an even share of the transformers' weights, and all of what is trained.

The weights of a layer are gathered from all processes just before it runs, and given up after it (``fully_shard`` of
PyTorch, FSDP2). They are frozen: what is trained, a LoRA and what a method learns, is small, is added to models that
have been shared out before, and stays whole in every process. So gradients, optimizer, average and files are those of
a training that is not sharded.

Gathering takes all processes, so that each has to run the same transformer as often as the others: also where its
share of the samples is smaller, or is of noise levels at which another transformer is at work.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin, gather_object, is_torch_version
from torch import nn

from falloff import api
from falloff.hosts import class_name
from falloff.training.cache import fingerprint
from falloff.training.errors import TrainingError
from falloff.training.loop import Item

ASK = "ACCELERATE_USE_FSDP"
"""Set to true by ``accelerate launch --use_fsdp``."""
TORCH = "2.8"
"""Before, all weights of a layer had to be of one type, and such as Wan keep norms in float32 beside bfloat16."""


def asked() -> bool:
    """Whether this process was started as one of several that are to share models out."""
    return os.environ.get(ASK, "false").lower() == "true" and int(os.environ.get("WORLD_SIZE", "1")) > 1


def transformers(pipe: Any) -> list[nn.Module]:
    """Those of a pipeline, which are shared out."""
    return [model for name in api.TRANSFORMERS if (model := getattr(pipe, name, None)) is not None]


def check(accelerator: Accelerator) -> None:
    """Raise ``TrainingError`` for settings of the launch that would not be followed."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = _plugin(accelerator)
    version = getattr(plugin, "fsdp_version", 1)  # Accelerate before 1.6 knows no other
    faults = {
        f"FSDP {version} is not served; add --fsdp_version 2": version != 2,
        f"FSDP 2 is served from PyTorch {TORCH} on, and this is {torch.__version__}": not is_torch_version(">=", TORCH),
        "weights stay on the device; leave --fsdp_offload_params out": isinstance(plugin.cpu_offload, CPUOffloadPolicy),
        "give falloff's own --checkpointing in place of --fsdp_activation_checkpointing": (
            plugin.activation_checkpointing
        ),
        "every layer is shared out; leave --fsdp_ignored_modules out": plugin.ignored_modules,
        "all processes share alike; leave --use_parallelism_config out": (
            getattr(accelerator, "parallelism_config", None) is not None
        ),
    }
    if found := [fault for fault, is_so in faults.items() if is_so]:
        raise TrainingError(f"accelerate was started with FSDP, and not all of it can be followed: {'; '.join(found)}")


def check_weights(pipe: Any, accelerator: Accelerator) -> None:
    """Raise ``TrainingError`` unless the transformers are whole, their weights plain floating-point numbers, and all
    models the same in every process, which keeps a share of its own copy."""
    for model in transformers(pipe):
        for name, weight in model.named_parameters():
            if type(weight) is not nn.Parameter or not weight.is_floating_point():
                raise TrainingError(
                    f"{name} of this {class_name(model)} is a {type(weight).__name__} of {weight.dtype}, and what is "
                    "to be shared out has to be whole, of plain floating-point numbers; load the pipeline anew, and "
                    "unquantized"
                )
    parts = sorted((name, part) for name, part in pipe.components.items() if isinstance(part, nn.Module))
    own = {name: None if any(p.is_meta for p in part.parameters()) else fingerprint(part) for name, part in parts}
    first, *others = gather_object([own])
    if unlike := [name for name in first if any(other.get(name) != first[name] for other in others)]:
        raise TrainingError(
            f"processes hold other weights of {' and '.join(unlike)} than the first; load the same checkpoint in all. "
            "Loaded after the processes have met, transformers fills those of the first alone, unless "
            "--fsdp_cpu_ram_efficient_loading is false"
        )


def shard(models: Iterable[nn.Module], accelerator: Accelerator) -> None:
    """Share models out between all processes, layer by layer, onto their devices.

    What is added to a model afterwards stays whole. There is no way back: each process is left with its share.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    release = _plugin(accelerator).reshard_after_forward
    for model in models:
        for part in (*_layers(model), model):
            fully_shard(part, mesh=mesh, reshard_after_forward=release)


@contextmanager
def quiet() -> Iterator[None]:
    """Without PyTorch's warning of models that put out a view, which something might change in place: nothing does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
        yield


def in_step(
    accelerator: Accelerator, items: Sequence[Item], models: Sequence[str], team: int = 1
) -> list[tuple[Item, bool]]:
    """What this process takes of work that all do together, so that all run the same model at any time.

    models: the model that each item is for. The items of one model are done by all processes, then those of the next;
    where the last round of a model has too few for all, the others do the last of them as well, and it does not count:
    the second value is False. team: processes that take each item together, as one.
    """
    process, processes = accelerator.process_index // team, accelerator.num_processes // team
    taken = []
    for model in sorted(set(models)):
        own = [item for item, needed in zip(items, models, strict=True) if needed == model]
        for start in range(0, len(own), processes):
            together = own[start : start + processes]
            taken.append((together[min(process, len(together) - 1)], process < len(together)))
    return taken


def _plugin(accelerator: Accelerator) -> Any:
    """Accelerate's settings; on CPUs it drops them, and they are still in the environment."""
    return getattr(accelerator.state, "fsdp_plugin", None) or FullyShardedDataParallelPlugin()


def _layers(model: nn.Module) -> list[nn.Module]:
    """Of a transformer, all that it runs one after the other."""
    lists = [child for child in model.children() if isinstance(child, nn.ModuleList)]
    return [layer for layers in lists for layer in layers]
