"""LoRA on the self-attention of a model: added, written as pipelines load it, and loaded again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falloff.hosts import host_for
from falloff.recipe import Recipe, RecipeError
from falloff.training.errors import TrainingError
from falloff.training.length import riflex

NAME = "falloff"
WEIGHTS, RECIPE = "pytorch_lora_weights.safetensors", "recipe.yaml"
"""What diffusers calls the weights of a LoRA, and what lies beside ours."""


def projections(model: nn.Module) -> list[str]:
    """Paths of the linear layers inside every self-attention module: query, key, value, output, and text's where it
    is part of the sequence. Where another LoRA is on a layer, it is the layer that counts."""
    found = []
    for path in host_for(model).attention_paths(model):
        inside = model.get_submodule(path).named_modules()
        linear = [name for name, module in inside if isinstance(module, nn.Linear) and ".lora_" not in name]
        found += [f"{path}.{name.removesuffix('.base_layer')}" for name in linear]
    return found


@contextmanager
def adapted(model: Any, rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """A new LoRA on a diffusers transformer, its parameters in float32; all others are frozen meanwhile.

    alpha is the rank, so that the delta is B A itself. The same seed makes the same LoRA. Raises ``TrainingError``
    when the model has a LoRA of our name already. An error inside takes the LoRA off again.
    """
    from peft import LoraConfig

    if NAME in getattr(model, "peft_config", {}):
        raise TrainingError(f"this {type(model).__name__} has a LoRA named {NAME!r} already; unload it first")
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=projections(model)), NAME)
        trained = {name: p for name, p in model.named_parameters() if f".{NAME}." in name}
        for parameter in trained.values():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        yield trained
    except BaseException:
        _take_off(model)
        raise
    finally:
        for parameter, before in wanted.items():
            parameter.requires_grad_(before)


def _take_off(model: Any) -> None:
    """Our LoRA; with the last of them the layers are the model's own again."""
    adapters = getattr(model, "peft_config", {})
    if set(adapters) == {NAME}:
        model.unload_lora()
    elif NAME in adapters:
        model.delete_adapters(NAME)


def save(pipe: Any, folder: Path) -> None:
    """Write the LoRA as ``pipe.load_lora_weights`` reads it, beside its place first."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(pipe.transformer, adapter_name=NAME)
    beside = f"{WEIGHTS}.part"
    pipe.save_lora_weights(folder, transformer_lora_layers=state, weight_name=beside)
    (folder / beside).replace(folder / WEIGHTS)


@contextmanager
def loaded(pipe: Any, source: str | Path) -> Iterator[None]:
    """A pipeline with a LoRA, of ours or another, by ``pipe.load_lora_weights``; and with the positions it was
    trained for, where a recipe beside it tells them.

    Raises ``TrainingError`` for what is no LoRA, or the LoRA of another model.
    """
    if not hasattr(pipe, "load_lora_weights"):
        raise TrainingError(f"{type(pipe).__name__} loads no LoRA")
    file = _file(Path(source))
    _check(_shapes(file), pipe.transformer, file)
    with ExitStack() as left:
        try:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=NAME)
        except (RuntimeError, KeyError, ValueError, TypeError) as error:  # its converters raise whatever they meet
            raise TrainingError(f"diffusers cannot load {file} into {type(pipe).__name__}: {error}") from error
        left.callback(pipe.unload_lora_weights)
        positions = _positions(file.parent / RECIPE)
        if positions.get("rope") == "riflex":
            left.enter_context(riflex(pipe.transformer, positions["trained_grid_frames"], positions["grid_frames"]))
        yield


def _file(source: Path) -> Path:
    file = source / WEIGHTS if source.is_dir() else source
    if file.is_file():
        return file
    if (source / RECIPE).is_file():
        raise TrainingError(
            f"there is no LoRA at {file}: what {source} holds was trained without one; its {RECIPE} alone is its method"
        )
    raise TrainingError(f"there is no LoRA at {file}; give a .safetensors file, or a folder with {WEIGHTS}")


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as content:
            return {name: tuple(content.get_slice(name).get_shape()) for name in content.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{file} is no readable .safetensors file: {error}") from error


def _check(shapes: Mapping[str, tuple[int, ...]], model: nn.Module, file: Path) -> None:
    """Of a LoRA in diffusers' own layout, whether its layers are this model's; others are diffusers' to convert."""
    layers = dict(model.named_modules())
    for name, shape in shapes.items():
        if not name.startswith("transformer.") or ".lora_" not in name:
            continue
        path, _, rest = name.removeprefix("transformer.").partition(".lora_")
        layer = layers.get(path)
        base = getattr(layer, "base_layer", layer)  # where another LoRA is on it already
        weight: Tensor | None = getattr(base, "weight", None)
        if weight is None:
            raise TrainingError(f"{file} is the LoRA of another model: this {type(model).__name__} has no layer {path}")
        axis = 1 if rest.startswith("A") else 0
        if shape[axis] != weight.shape[axis] and not rest.startswith(("alpha", "magnitude")):
            raise TrainingError(
                f"{file} is the LoRA of another model: its {path} has {shape[axis]} channels, that of this "
                f"{type(model).__name__} {weight.shape[axis]}"
            )


def _positions(file: Path) -> Mapping[str, Any]:
    try:
        return Recipe.load(file).evidence if file.is_file() else {}
    except RecipeError as error:
        raise TrainingError(f"the recipe beside the LoRA cannot be read: {error}") from error
