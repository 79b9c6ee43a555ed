"""``falloff methods``: what can be enabled, with every setting."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from falloff.cli.errors import USAGE, CommandError

if TYPE_CHECKING:
    from falloff.methods.base import Method


def methods(
    name: Annotated[str | None, typer.Argument(help="One method, told in detail.", show_default=False)] = None,
) -> None:
    """List the methods with their settings and defaults."""
    from falloff.methods import METHODS

    if name is None:
        for method in METHODS.values():
            typer.echo(f"{method.name}: {_summary(method)}")
            typer.echo(f"  settings: {_words(_defaults(method)) or 'none'}")
        typer.echo("Details and presets: falloff methods NAME")
        return
    if name not in METHODS:
        raise CommandError(f"unknown method {name!r}; choose one of {', '.join(sorted(METHODS))}", USAGE)
    _show(METHODS[name])


def _show(method: type[Method]) -> None:
    from falloff.methods.presets import PRESETS

    module = inspect.getdoc(sys.modules[method.__module__])
    typer.echo(f"{method.name}: {module}")
    typer.echo(f"\nSettings\n{_indented(inspect.getdoc(method) or '')}")
    typer.echo(f"\nDefaults\n  {_words(_defaults(method)) or 'none'}")
    typer.echo(f"  schedule: {_words(dataclasses.asdict(method.schedule))}")
    presets = {name: preset for name, preset in PRESETS.items() if preset.method.name == method.name}
    if presets:
        typer.echo("\nPresets")
    for name, preset in presets.items():
        typer.echo(f"  {name}")
        changed = _words(_changed(preset.method)) or "the defaults"
        typer.echo(f"    {changed}; {_words(dataclasses.asdict(preset.schedule))}")
        typer.echo(f"    {preset.evidence}")


def _summary(method: type[Method]) -> str:
    """First line of the method's file, which names its source."""
    return (inspect.getdoc(sys.modules[method.__module__]) or "").splitlines()[0]


def _defaults(method: type[Method]) -> dict[str, Any]:
    return method().settings()


def _changed(method: Method) -> dict[str, Any]:
    defaults = _defaults(type(method))
    return {name: value for name, value in method.settings().items() if value != defaults[name]}


def _words(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    """As ``--set`` takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.splitlines())
