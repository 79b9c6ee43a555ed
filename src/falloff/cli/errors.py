"""What goes wrong through no fault of the program: told in one line, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

USAGE, FAILURE = 2, 1


class CommandError(Exception):
    """Ends the command with this message and exit code."""

    def __init__(self, message: str, code: int = FAILURE) -> None:
        super().__init__(message)
        self.code = code


@contextmanager
def told(*kinds: type[Exception], before: str = "", code: int = FAILURE) -> Iterator[None]:
    """Turn these exceptions into a ``CommandError`` that reads ``before`` and then their message."""
    try:
        yield
    except kinds as error:
        raise CommandError(f"{before}{error or type(error).__name__}", code) from error


def one_line(text: str) -> str:
    return " ".join(text.split())
