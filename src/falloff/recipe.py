"""A recipe: a method, what stays dense and the kernel for one model, in a YAML file with the evidence behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falloff import methods
from falloff.methods.base import Method
from falloff.schedule import Schedule

FORMAT = 1
"""Raised when a file of this version can no longer be read by falloff before it."""
_REQUIRED = ("falloff", "model", "layers", "method", "settings", "schedule")
_OPTIONAL = ("kernel", "evidence", "branches")


class RecipeError(ValueError):
    """A recipe that cannot be read, or is not for this model."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """``enable(pipe, Recipe.load("wan.yaml"))``.

    model, layers: the transformer's class name and its number of self-attention layers; a recipe is for no other,
    because a schedule names layers. evidence: plain values, what was measured and how. branches: the file of what the
    method has learned, by ``falloff.save_branches``; a recipe's file names one beside it by its name alone.
    """

    model: str
    layers: int
    method: Method
    schedule: Schedule
    kernel: str = "auto"
    evidence: Mapping[str, Any] = field(default_factory=dict)
    branches: str | None = None

    def check(self, model: str, layers: int) -> None:
        """Raise ``RecipeError`` unless the recipe is for such a transformer."""
        if (model, layers) != (self.model, self.layers):
            raise RecipeError(
                f"the recipe is for {self.model} with {self.layers} self-attention layers, this is {model} with "
                f"{layers}; tune one for it with 'falloff tune'"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; ``from_dict`` reads them back."""
        learned = {"branches": self.branches} if self.branches is not None else {}
        return {
            "falloff": FORMAT,
            "model": self.model,
            "layers": self.layers,
            "method": self.method.name,
            "settings": _plain(self.method.settings()),
            "schedule": _plain(dataclasses.asdict(self.schedule)),
            "kernel": self.kernel,
            "evidence": _plain(dict(self.evidence)),
            **learned,
        }

    @staticmethod
    def from_dict(values: Any) -> Recipe:
        """Raises ``RecipeError`` that names what is missing, unknown or illegal."""
        if not isinstance(values, Mapping):
            raise RecipeError(f"a recipe maps names to values, got {type(values).__name__}")
        _check_format(values)
        if missing := [name for name in _REQUIRED if name not in values]:
            raise RecipeError(f"a recipe needs {', '.join(missing)}")
        if unknown := [name for name in values if name not in (*_REQUIRED, *_OPTIONAL)]:
            raise RecipeError(f"a recipe has no {', '.join(map(str, unknown))}")
        try:
            return Recipe(
                model=str(values["model"]),
                layers=int(values["layers"]),
                method=methods.get(values["method"], **_tuples(values["settings"])),
                schedule=Schedule(**_tuples(values["schedule"])),
                kernel=str(values.get("kernel", "auto")),
                evidence=dict(values.get("evidence") or {}),
                branches=str(values["branches"]) if values.get("branches") is not None else None,
            )
        except (TypeError, ValueError) as error:
            raise RecipeError(f"the recipe cannot be used: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the YAML file, beside its place first. Raises ``OSError``."""
        import yaml

        path, values = Path(path), self.to_dict()
        if self.branches is not None and Path(self.branches).parent.resolve() == path.parent.resolve():
            values["branches"] = Path(self.branches).name
        beside = path.with_name(path.name + ".part")
        beside.write_text(yaml.safe_dump(values, sort_keys=False, allow_unicode=True), encoding="utf-8")
        beside.replace(path)

    @staticmethod
    def load(path: str | Path) -> Recipe:
        """Read a YAML file. Raises ``RecipeError`` for what is no recipe, ``OSError`` for what cannot be read."""
        import yaml

        try:
            recipe = Recipe.from_dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from error
        if recipe.branches is None:
            return recipe
        return dataclasses.replace(recipe, branches=str(Path(path).parent / recipe.branches))


def _check_format(values: Mapping[str, Any]) -> None:
    version = values.get("falloff")
    if isinstance(version, int) and version > FORMAT:
        raise RecipeError(f"the recipe has format {version}, this falloff reads up to {FORMAT}; install a newer one")


def _plain(value: Any) -> Any:
    """As YAML writes it without tags."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings are immutable, YAML knows lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
