"""Foreign model families: which modules are self-attention, and how to read their grid.

A family file is data (see ``wan``). ``host_for`` finds the family of a model by its class name, so that nothing
here imports the foreign library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn


class UnsupportedModelError(TypeError):
    """A model or pipeline that falloff cannot attach to, and what it can attach to."""


Given = Mapping[str, Any]
"""The arguments of one forward of a model, by name."""
Size = tuple[int, int, int]
"""Frames, height, width."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """How to read one family of diffusers transformers."""

    family: str
    models: tuple[str, ...]
    """Class names of the transformers."""
    self_attention: tuple[str, ...]
    """Module paths of the self-attention layers, ``*`` for a layer's number, in the order of the layers."""
    grid: Callable[[Given, Any], Size | str]
    """The grid of a forward from its arguments and the model's config, or why it has none and stays dense."""
    text_side: Literal["after", "before"] | None = None
    """Where text stands in the self-attention calls; ``None``: there is none."""
    frames: bool = True
    """False for image models, whose grids have one frame for each image."""
    branches: tuple[str, ...] = ("cond", "uncond")
    """What the passes of one step are, in the order of this family's pipelines, where these do not tell."""
    square_mask: bool = False
    """Masks are [B, 1, S, S], valid queries by valid keys: the first row, which is valid, tells the valid keys."""
    refuse: Callable[[Any], str | None] = lambda config: None
    """Why a model cannot be served, from its config; asked before every forward, as pipelines may change it.

    Its docstring says in a few words which models those are, for the table of models.
    """
    refused: Mapping[str, str] = field(default_factory=dict)
    """Class names of the family that cannot be served, and why."""

    def attention_paths(self, model: nn.Module) -> list[str]:
        """Paths of the self-attention modules in the order of the layers.

        Raises ``UnsupportedModelError`` when a block shows none, as one does that was traced or replaced whole.
        """
        paths = [path for path, _ in model.named_modules()]
        found = [[path for path in paths if _matches(path, pattern)] for pattern in self.self_attention]
        for pattern, seen in zip(self.self_attention, found, strict=True):
            blocks, _, inside = pattern.partition(".*.")
            count = len(model.get_submodule(blocks)) if blocks in paths else 0  # type: ignore[arg-type]  # a list
            if len(seen) != count:
                raise UnsupportedModelError(
                    f"{count - len(seen)} of {count} {blocks} of this {type(model).__name__} hide their self-attention "
                    f"({inside}), as traced or replaced blocks do; call falloff.enable on the model as it was loaded "
                    "and convert it afterwards, or compile it with torch.compile, which hides nothing"
                )
        return [path for seen in found for path in seen]


_registered: dict[str, Host] = {}


def hosts() -> tuple[Host, ...]:
    """All families, those of users last."""
    from falloff.hosts import (
        allegro,
        cogvideox,
        flux,
        hunyuan_video,
        hunyuan_video15,
        kandinsky5,
        linear,
        ltx,
        mochi,
        qwenimage,
        skyreels_v2,
        wan,
    )

    families = (
        wan,
        hunyuan_video,
        hunyuan_video15,
        mochi,
        cogvideox,
        ltx,
        skyreels_v2,
        kandinsky5,
        allegro,
        flux,
        qwenimage,
        linear,
    )
    return (*(family.HOST for family in families), *_registered.values())


def register(host: Host) -> None:
    """Make a family of your own known to ``falloff.enable`` and all that builds on it, for this process.

    A family registered again under its name takes the place of the one before. Raises ``TypeError`` for a host that
    does not describe its models, and ``ValueError`` when another family has one of them already.
    """
    for name in ("models", "self_attention"):
        value = getattr(host, name)
        if not isinstance(value, tuple) or not value or not all(isinstance(entry, str) for entry in value):
            raise TypeError(f"{name} of the family {host.family} must be a tuple of strings, got {value!r}")
    if not callable(host.grid):
        raise TypeError(f"grid of the family {host.family} must be a function, got {host.grid!r}")
    for other in hosts():
        shared = {*other.models, *other.refused} & {*host.models, *host.refused}
        if shared and _registered.get(host.family) is not other:
            raise ValueError(f"the family {other.family} has {', '.join(sorted(shared))} already")
    _registered[host.family] = host


def class_name(model: object) -> str:
    """Of the class that a model was built as: PyTorch's ``fully_shard`` gives it one derived from that."""
    kinds = type(model).__mro__
    sharded = len(kinds) > 2 and kinds[1].__name__ == "FSDPModule"
    return kinds[2 if sharded else 0].__name__


def host_for(model: object) -> Host:
    """The family of a model. Raises ``UnsupportedModelError`` for a model of none."""
    name = class_name(model)
    for host in hosts():
        if name in host.refused:
            raise UnsupportedModelError(f"falloff cannot serve {name}: {host.refused[name]}")
        if name in host.models:
            return host
    supported = ", ".join(f"{model} ({host.family})" for host in hosts() for model in host.models)
    raise UnsupportedModelError(
        f"falloff does not know the model class {name}; it knows {supported}. Another one that calls diffusers' "
        "attention dispatcher is described in about 20 lines: see docs/new-family.md and falloff.hosts.register"
    )


def latent_grid(patch: Callable[[Any], Size], axes: Size = (2, 3, 4)) -> Callable[[Given, Any], Size]:
    """Reads the grid off the latent video ``hidden_states``, whose ``axes`` are cut into patches."""

    def grid(given: Given, config: Any) -> Size:
        shape = given["hidden_states"].shape
        frames, height, width = (shape[axis] // size for axis, size in zip(axes, patch(config), strict=True))
        return frames, height, width

    return grid


def _matches(path: str, pattern: str) -> bool:
    """Glob by path component: ``*`` never crosses a dot, and what ``torch.compile`` wraps is where it was."""
    parts, wanted = [part for part in path.split(".") if part != "_orig_mod"], pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
