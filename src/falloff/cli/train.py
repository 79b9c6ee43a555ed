"""``falloff train``: the commands that tune a model."""

from __future__ import annotations

import typer

app = typer.Typer(
    help="Tune a model to its sparse attention.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
