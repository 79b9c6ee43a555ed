"""A checkpoint, looked over before its weights are loaded: is it whole, is it known, can it make this size."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

from falloff.cli.errors import USAGE, CommandError

FAMILY_MULTIPLE = 16
"""Wan pipelines want heights and widths divisible by this, whatever their autoencoder."""


@dataclass(frozen=True)
class Checkpoint:
    """A pipeline's folder, or its name on the hub (then nothing is known before it is loaded).

    ``defaults``: call arguments that the folder's generation.json suggests; ``fps``: for playing its videos.
    """

    source: str
    name: str
    defaults: dict[str, Any]
    fps: float = 16
    frames_factor: int | None = None
    """Legal frame counts leave 1 when divided by this."""
    size_factor: int | None = None
    """Heights and widths are multiples of this."""
    pipeline: str | None = None
    """Name of its class."""

    def kind(self) -> type | None:
        """The class of its pipeline, where it is known before it is loaded."""
        import diffusers

        return getattr(diffusers, self.pipeline or "", None)

    def check_size(self, arguments: dict[str, Any]) -> None:
        """Raise ``CommandError`` for frames, height or width that the model cannot make."""
        for name, label in (("height", "height"), ("width", "width")):
            value = arguments.get(name)
            if value is not None and self.size_factor and value % self.size_factor:
                raise CommandError(
                    f"--{label} {value} is not a multiple of {self.size_factor}; "
                    f"the nearest are {_nearest(value, self.size_factor, 0)}",
                    USAGE,
                )
        frames = arguments.get("num_frames")
        if frames is not None and self.frames_factor and frames % self.frames_factor != 1 % self.frames_factor:
            raise CommandError(
                f"--frames {frames} is not 1 more than a multiple of {self.frames_factor}, as the autoencoder needs; "
                f"the nearest are {_nearest(frames, self.frames_factor, 1)}",
                USAGE,
            )


DECODER = "LPDPipeline"
IN_TILES = "AutoencoderKLAllegro"
"""An autoencoder that encodes and decodes in tiles alone, and in any number of frames that these cover."""


def find(model: str | None, *, by_class: bool = False) -> Checkpoint:
    """Look a checkpoint over; ``by_class``: one that decodes images of classes.

    Raises ``CommandError`` when it is missing, incomplete, or of no supported family.
    """
    if model is None and by_class:
        return _bundled_decoder()
    if model is None:
        from falloff.miniature import path as bundled

        return _folder(bundled(), "the bundled miniature")
    path = Path(model)
    if path.is_dir():
        return _folder(path, model, by_class)
    if path.exists():
        raise CommandError(f"{model} is a file; --model takes a checkpoint folder or a name on the hub", USAGE)
    if path.is_absolute() or model.startswith(".") or model.count("/") != 1:
        raise CommandError(f"there is no folder {model}; --model takes a checkpoint folder or a name on the hub", USAGE)
    return Checkpoint(model, model, {})


def decodes(model: str) -> bool:
    """Whether a folder holds a pipeline that decodes images of classes."""
    index = Path(model) / "model_index.json"
    return index.is_file() and _read(index, "").get("_class_name") == DECODER


def _bundled_decoder() -> Checkpoint:
    from falloff.miniature import images

    return _folder(images.path(), "the bundled image miniature", by_class=True)


def _folder(path: Path, name: str, by_class: bool = False) -> Checkpoint:
    index = _read(path / "model_index.json", f"{path} is no pipeline folder")
    for component, entry in index.items():
        if isinstance(entry, list) and entry[0] is not None:
            _check_component(path / component)
    _check_kind(index.get("_class_name"), name, by_class)
    if not by_class:
        _check_family(index, name)
    vae, transformer = _config(path / "vae"), _config(path / "transformer")
    hints = _read(path / "generation.json", "") if (path / "generation.json").exists() else {}
    return Checkpoint(
        source=str(path),
        name=name,
        defaults={key: value for key, value in hints.items() if key != "fps"},
        fps=hints.get("fps", 16),
        frames_factor=_frames_factor(vae),
        size_factor=_size_factor(vae, transformer),
        pipeline=index.get("_class_name"),
    )


def _check_component(folder: Path) -> None:
    """A component has a configuration, and if it is a model (config.json) all its weights."""
    missing = f"the checkpoint is incomplete; copy or download {folder.parent} again"
    if not folder.is_dir():
        raise CommandError(f"{folder} is missing: {missing}")
    if not list(folder.glob("*config*.json")):
        raise CommandError(f"{folder} holds no configuration: {missing}")
    if not (folder / "config.json").exists():
        return
    for index in folder.glob("*.index.json"):
        for shard in sorted(set(_read(index, "").get("weight_map", {}).values())):
            if not (folder / shard).exists():
                raise CommandError(f"{folder / shard} is missing: {missing}")
    if not [file for kind in ("*.safetensors", "*.bin") for file in folder.glob(kind)]:
        raise CommandError(f"{folder} holds no weights (*.safetensors or *.bin): {missing}")


def _check_kind(pipeline: str | None, name: str, by_class: bool) -> None:
    if by_class and pipeline != DECODER:
        raise CommandError(f"--class needs a model with {DECODER}, {name} has {pipeline}; give a prompt instead", USAGE)
    if pipeline == DECODER and not by_class:
        raise CommandError(f"{name} makes images of classes, not of prompts; give --class", USAGE)


def _check_family(index: dict[str, Any], name: str) -> None:
    from falloff.hosts import hosts

    entry = index.get("transformer")
    found = entry[1] if isinstance(entry, list) and entry[1] else "no transformer"
    for host in hosts():
        if found in host.refused:
            raise CommandError(f"{name} has {found}, which cannot be served: {host.refused[found]}")
        if found in host.models:
            return
    known = ", ".join(f"{model} ({host.family})" for host in hosts() for model in host.models)
    raise CommandError(f"{name} has {found}, which falloff does not know; choose a model with {known}")


def _frames_factor(vae: dict[str, Any]) -> int | None:
    if vae.get("_class_name") == IN_TILES:
        return None
    for key in ("scale_factor_temporal", "temporal_compression_ratio"):
        if isinstance(vae.get(key), int):
            return int(vae[key])
    halvings = vae.get("temperal_downsample")  # sic: diffusers' own spelling
    return 2 ** sum(halvings) if halvings else None


def _size_factor(vae: dict[str, Any], transformer: dict[str, Any]) -> int | None:
    patch = transformer.get("patch_size", 1)
    patch = patch[-1] if isinstance(patch, list) else patch
    halvings = vae.get("temperal_downsample")
    spatial = vae.get("scale_factor_spatial") or (2 ** len(halvings) if halvings else None)
    return lcm(spatial * patch, FAMILY_MULTIPLE) if spatial else None


def _nearest(value: int, factor: int, rest: int) -> str:
    below = (value - rest) // factor * factor + rest
    return f"{below} and {below + factor}" if below > 0 else str(below + factor)


def _config(folder: Path) -> dict[str, Any]:
    return _read(folder / "config.json", "") if (folder / "config.json").exists() else {}


def _read(path: Path, otherwise: str) -> dict[str, Any]:
    """A JSON object from a file. ``otherwise`` begins the message for a file that is not there."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CommandError(f"{otherwise}: it has no {path.name}") from error
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CommandError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise CommandError(f"{path} must hold a JSON object; it holds a {type(content).__name__}")
    return content
