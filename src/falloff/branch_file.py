"""What a method has learned, as one small safetensors file that says for which models and settings it was.

Tensors are named ``model.layer.parameter`` by their numbers. Files of others hold a whole model, whose SLA projections
are found by name: ``blocks.N. ... .proj_l.weight`` and ``.bias``, as TurboDiffusion and FastVideo write them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falloff.methods.base import Method

FORMAT = "1"
"""Changed when a file of this version can no longer be read by falloff before it."""
KIND = "branches"
FOREIGN = re.compile(r"(?:^|\.)blocks\.(\d+)\..*proj_l\.(weight|bias)$")
FOREIGN_SETTINGS = {"linear_over": "all", "features": "softmax"}
"""What SLA's later published code does, of which such files are."""


class BranchError(ValueError):
    """Trained parameters that are not there, cannot be read, or are not for this model or method."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """What parameters are of: models as (class name, number of self-attention layers), and the method."""

    models: tuple[tuple[str, int], ...]
    method: str
    settings: Mapping[str, Any]
    """Those that the parameters mean something else without."""


def label_of(method: Method, models: list[tuple[str, int]]) -> Label:
    return Label(models=tuple(models), method=method.name, settings=method.branch_settings)


def save(path: str | Path, modules: nn.ModuleDict, label: Label, method: Method) -> None:
    """Write beside its place, then rename. Raises ``OSError``."""
    from safetensors.torch import save_file

    path = Path(path)
    beside = path.with_name(path.name + ".part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in modules.state_dict().items()}
    metadata = {
        "falloff": FORMAT,
        "kind": KIND,
        "models": json.dumps(label.models),
        "method": label.method,
        "branch_settings": json.dumps(dict(label.settings)),
        "settings": json.dumps(method.settings()),
    }
    save_file(tensors, beside, metadata=metadata)
    beside.replace(path)


def load(path: str | Path, modules: nn.ModuleDict, label: Label) -> None:
    """Read parameters into ``modules``; layers that have none here are passed over. All or nothing.

    Raises ``BranchError`` when the file is of another model, method or setting, or lacks something, ``OSError``
    when it cannot be read.
    """
    path = Path(path)
    metadata, tensors = _read(path)
    if metadata.get("kind") == KIND:
        _check_label(path, metadata, label)
    else:
        tensors = _foreign(path, tensors, label)
    own = modules.state_dict()
    missing = [name for name in own if name not in tensors]
    if missing:
        raise BranchError(f"{path} lacks {len(missing)} of {len(own)} parameters, the first of them {missing[0]}")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise BranchError(
                f"{path}: {name} is {list(tensors[name].shape)}, this model's is {list(tensor.shape)}; it is of "
                "a model of another size"
            )
    modules.load_state_dict({name: tensors[name] for name in own})


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors; of a foreign file the projections alone."""
    if path.suffix in (".pt", ".pth"):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {}, {name: tensor for name, tensor in state.items() if FOREIGN.search(name)}
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            ours = metadata.get("kind") == KIND
            return metadata, {name: file.get_tensor(name) for name in file.keys() if ours or FOREIGN.search(name)}  # noqa: SIM118  # no mapping
    except SafetensorError as error:
        raise BranchError(f"{path} is no safetensors file: {error}") from error


def _check_label(path: Path, metadata: Mapping[str, str], label: Label) -> None:
    if metadata.get("falloff") != FORMAT:
        raise BranchError(f"{path} has format {metadata.get('falloff')}, this falloff reads {FORMAT}")
    models = tuple((str(name), int(layers)) for name, layers in json.loads(metadata["models"]))
    if models != label.models:
        raise BranchError(f"{path} is for {_words(models)}, this is {_words(label.models)}")
    if metadata["method"] != label.method:
        raise BranchError(
            f"{path} is of the method {metadata['method']!r}, enabled is {label.method!r}; enable that of the file"
        )
    settings, enabled = json.loads(metadata["branch_settings"]), json.loads(json.dumps(dict(label.settings)))
    if settings != enabled:
        raise BranchError(f"{path} was trained with {settings}, enabled is {enabled}; enable the file's settings")


def _foreign(path: Path, tensors: Mapping[str, Tensor], label: Label) -> dict[str, Tensor]:
    """The projections of a file that is not ours, by our names."""
    found = {FOREIGN.search(name): tensor for name, tensor in tensors.items()}
    named = {f"0.{match[1]}.proj.{match[2]}": tensor for match, tensor in found.items() if match is not None}
    if not named:
        raise BranchError(f"{path} holds no trained parameters, neither falloff's nor SLA's blocks.N. ... .proj_l")
    if label.method != "sla" or dict(label.settings) != FOREIGN_SETTINGS:
        raise BranchError(
            f"{path} holds projections of SLA over all keys, enabled is {label.method} with {dict(label.settings)}; "
            'enable SLA(linear_over="all")'
        )
    if len(label.models) != 1:
        raise BranchError(f"{path} is of one transformer, and {len(label.models)} are enabled; pass the one it is for")
    return named


def _words(models: tuple[tuple[str, int], ...]) -> str:
    return " and ".join(f"{name} with {layers} self-attention layers" for name, layers in models)
