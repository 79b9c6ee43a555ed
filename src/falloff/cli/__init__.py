"""The command line: ``falloff generate``, ``compare``, ``tune``, ``train``, ``bench``, ``doctor`` and ``methods``.

Nothing heavy is imported here or at the top of a command's file, so that ``falloff --help`` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, cast

import typer

from falloff.cli import (
    bench,
    bench_attention,
    bench_model,
    compare,
    doctor,
    generate,
    methods,
    train,
    train_lora,
    train_sparse,
    tune,
)
from falloff.cli.errors import CommandError, one_line

INTERRUPTED = 130
UsageError: type[Exception] = cast(type[Exception], typer.BadParameter.__mro__[1])
"""Wrong arguments, as typer finds them; older versions of typer take the class from click, newer have their own."""

app = typer.Typer(
    name="falloff",
    help="Faster diffusion video on ordinary pipelines, with its price in quality shown.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("compare")(compare.compare)
app.command("tune")(tune.tune)
bench.app.command("attention")(bench_attention.attention)
bench.app.command("model")(bench_model.model)
app.add_typer(bench.app, name="bench")
train.app.command("lora")(train_lora.lora)
train.app.command("sparse")(train_sparse.sparse)
app.add_typer(train.app, name="train")
app.command("doctor")(doctor.doctor)
app.command("methods")(methods.methods)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"falloff {_version()}")
        raise typer.Exit


def _version() -> str:
    try:
        return version("falloff")
    except PackageNotFoundError:
        return "of unknown version: its sources are used without being installed"


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """The ``falloff`` program."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; an error is one line on stderr: 2 for wrong usage, else 1."""
    try:
        code = app(list(arguments), prog_name="falloff", standalone_mode=False)
    except UsageError as error:
        # the message is empty where no command was given and typer has shown the help instead
        return _fail(f"{error.format_message().rstrip('.')}; see 'falloff --help'" if str(error) else "", 2)  # type: ignore[attr-defined]  # of typer's own class, found at run time
    except CommandError as error:
        return _fail(str(error), error.code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if message:
        print(one_line(f"falloff: {message}"), file=sys.stderr)
    return code


__all__ = ["app", "main", "run"]
