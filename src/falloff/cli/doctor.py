"""``falloff doctor``: what is installed, and what can run on this machine."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer


def doctor(
    json_: Annotated[bool, typer.Option("--json", help="The same as JSON.")] = False,
) -> None:
    """Show versions, devices, and every kernel: can it run here, and if not, why."""
    typer.echo("trying kernels of others; the first time, some are compiled for up to a minute", err=True)
    found = examine()
    if json_:
        typer.echo(json.dumps(found, indent=2))
        return
    for section in ("versions", "machine"):
        typer.echo(section)
        for name, value in found[section].items():
            typer.echo(f"  {name:<22}{value}")
    typer.echo("kernels")
    for kernel in found["kernels"]:
        typer.echo(f"  {kernel['name']:<22}{'can run' if kernel['can_run'] else 'cannot run'}: {kernel['why']}")


def examine() -> dict[str, Any]:
    """Plain values for JSON."""
    import torch

    from falloff import kernels
    from falloff.evaluation import machine

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    missing = dict.fromkeys(machine.PACKAGES, "not installed")
    return {
        "versions": missing | machine.versions(),
        "machine": machine.describe(device),
        "kernels": [{"name": name, "can_run": can, "why": why} for name, can, why in kernels.available(prove=True)],
    }
