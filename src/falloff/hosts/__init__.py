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


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a model's forward: by name, or by position when given so."""

    name: str
    position: int

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return kwargs[self.name] if self.name in kwargs else args[self.position]


@dataclass(frozen=True, kw_only=True)
class Host:
    """How to read one family of diffusers transformers."""

    family: str
    models: tuple[str, ...]
    """Class names of the transformers."""
    self_attention: tuple[str, ...]
    """Module paths of the self-attention layers, ``*`` for a layer's number, in the order of the layers."""
    latent: Argument
    """The latent video [B, C, F, H, W]; its grid is (F, H, W) // ``patch``."""
    patch: Callable[[Any], tuple[int, int, int]]
    """The patch (frames, height, width) of a model, from its config."""
    timestep: Argument
    text_side: Literal["after", "before"] | None = None
    """Where text stands in the self-attention calls; ``None``: there is none."""
    branches: tuple[str, ...] = ()
    """What the passes of one step are, in the order of this family's pipelines, where these do not tell."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Class names of the family that cannot be served, and why."""

    def attention_paths(self, model: nn.Module) -> list[str]:
        """Paths of the self-attention modules in the order of the layers."""
        paths = [path for path, _ in model.named_modules()]
        return [path for pattern in self.self_attention for path in paths if _matches(path, pattern)]


def hosts() -> tuple[Host, ...]:
    """All families."""
    from falloff.hosts import wan

    return (wan.HOST,)


def host_for(model: object) -> Host:
    """The family of a model. Raises ``UnsupportedModelError`` for a model of none."""
    name = type(model).__name__
    for host in hosts():
        if name in host.refused:
            raise UnsupportedModelError(f"falloff cannot serve {name}: {host.refused[name]}")
        if name in host.models:
            return host
    supported = ", ".join(f"{model} ({host.family})" for host in hosts() for model in host.models)
    raise UnsupportedModelError(f"falloff does not know the model class {name}; it knows {supported}")


def _matches(path: str, pattern: str) -> bool:
    """Glob by path component: ``*`` never crosses a dot."""
    parts, wanted = path.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
