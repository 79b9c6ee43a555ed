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
from falloff.training import injected
from falloff.training.errors import TrainingError
from falloff.training.length import riflex
from falloff.training.noising import FIRST, SECOND

NAME = "falloff"
WEIGHTS, SECOND_WEIGHTS, RECIPE = (
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights_2.safetensors",
    "recipe.yaml",
)
"""What diffusers calls the weights of a LoRA, and what lies beside ours: the LoRA of a second transformer, which
diffusers loads from a file of its own alone, and the recipe."""
FILES = {FIRST: WEIGHTS, SECOND: SECOND_WEIGHTS}
LOADS, LOADS_ITSELF = "load_lora_weights", "load_lora_adapter"
"""How pipelines load a LoRA, and how transformers do whose pipeline does not; some can neither."""


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
            config = LoraConfig(r=rank, lora_alpha=rank, target_modules=projections(model))
            injected.add(model, config, NAME)
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


@contextmanager
def all_adapted(models: Mapping[str, Any], rank: int, seed: int) -> Iterator[dict[str, nn.Parameter]]:
    """``adapted`` for every transformer of a pipeline, by the pipeline's names for them."""
    with ExitStack() as left:
        parameters = {}
        for number, (expert, model) in enumerate(models.items()):
            own = left.enter_context(adapted(model, rank, seed + number))
            parameters.update(of_expert(expert, own))
        yield parameters


def of_expert(expert: str, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Parameters by names that no other transformer of the pipeline has."""
    return {name if expert == FIRST else f"{expert}.{name}": p for name, p in parameters.items()}


def _take_off(model: Any) -> None:
    """Our LoRA; with the last of them the layers are the model's own again."""
    adapters = getattr(model, "peft_config", {})
    if set(adapters) == {NAME}:
        injected.remove(model)
    elif NAME in adapters:
        injected.delete(model, NAME)


def unload(pipe: Any) -> None:
    """Take every LoRA off a pipeline."""
    if hasattr(pipe, LOADS):
        pipe.unload_lora_weights()
    else:
        injected.remove(pipe.transformer)


def save(pipe: Any, folder: Path) -> None:
    """Write the LoRA of every transformer as ``pipe.load_lora_weights`` reads it, beside its place first; and in the
    same layout, which ``pipe.transformer.load_lora_adapter`` reads, where the pipeline itself loads none."""
    from peft import get_peft_model_state_dict

    for expert, file in FILES.items():
        model = getattr(pipe, expert, None)
        if NAME not in getattr(model, "peft_config", {}):
            continue
        state = get_peft_model_state_dict(model, adapter_name=NAME)
        beside = f"{file}.part"
        if hasattr(pipe, "save_lora_weights"):
            pipe.save_lora_weights(folder, transformer_lora_layers=state, weight_name=beside)
        else:
            _write(state, folder / beside)
        (folder / beside).replace(folder / file)


def _write(state: Mapping[str, Tensor], file: Path) -> None:
    """The LoRA of the first transformer."""
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{FIRST}.{name}": x.cpu().contiguous() for name, x in state.items()}, file, metadata={"format": "pt"})


@contextmanager
def loaded(pipe: Any, source: str | Path) -> Iterator[None]:
    """A pipeline with a LoRA, of ours or another, by ``pipe.load_lora_weights`` or, where the pipeline has no such
    thing, by its transformer; and with the positions it was trained for, where a recipe beside it tells them.

    A folder with a LoRA for a second transformer has that loaded too; a file is the LoRA of the first, or the second's
    where its name is ours for that.

    Raises ``TrainingError`` for what is no LoRA, or the LoRA of another model.
    """
    if not hasattr(pipe, LOADS) and not hasattr(pipe, FIRST):
        raise TrainingError(f"{type(pipe).__name__} loads no LoRA")
    files = _files(Path(source))
    for expert, file in files.items():
        if (model := getattr(pipe, expert, None)) is None:
            raise TrainingError(f"{file} is for a second transformer, which this {type(pipe).__name__} does not have")
        _check(_shapes(file), model, file)
    with ExitStack() as left:
        for expert, file in files.items():
            _load(pipe, expert, file)
            left.callback(unload, pipe)
        _move(pipe, file.parent / RECIPE, left)
        yield


def _load(pipe: Any, expert: str, file: Path) -> None:
    second = {} if expert == FIRST else {f"load_into_{expert}": True}
    loader = getattr(pipe, LOADS, None) or getattr(pipe.transformer, LOADS_ITSELF, None)
    try:
        if loader is None:
            injected.load(pipe.transformer, file, f"{FIRST}.", NAME)
        else:
            loader(str(file.parent), weight_name=file.name, adapter_name=NAME, **second)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:  # its converters raise whatever they meet
        raise TrainingError(f"diffusers cannot load {file} into {type(pipe).__name__}: {error}") from error


def _move(pipe: Any, recipe: Path, left: ExitStack) -> None:
    """Give every transformer the positions that a recipe tells, until ``left`` is left."""
    positions = _positions(recipe)
    if positions.get("rope") == "riflex":
        for model in filter(None, (getattr(pipe, expert, None) for expert in FILES)):
            left.enter_context(riflex(model, positions["trained_grid_frames"], positions["grid_frames"]))


def _files(source: Path) -> dict[str, Path]:
    """The files of a LoRA by the transformer that each is for; the first's is there, or the error says what is."""
    if not source.is_dir():
        return {SECOND if source.name == SECOND_WEIGHTS else FIRST: _file(source, source)}
    first, second = _file(source, source / WEIGHTS), source / SECOND_WEIGHTS
    return {FIRST: first, **({SECOND: second} if second.is_file() else {})}


def _file(source: Path, file: Path) -> Path:
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
