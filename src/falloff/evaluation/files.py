"""Whole files or none: written beside their place, then renamed."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write(path: Path, data: bytes | str) -> None:
    """Put a file in place in one step. An interrupted or failed write leaves nothing behind.

    Raises ``OSError`` with a message that names the folder when it cannot be written to.
    """
    content = data.encode() if isinstance(data, str) else data
    check_writable(path.parent)
    handle, beside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, path)
    except BaseException:
        os.unlink(beside)
        raise


def check_writable(folder: Path) -> None:
    """Raise ``OSError`` unless files can be made in ``folder``; a folder not there yet is judged by its parents."""
    if folder.exists():
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder} is a file, not a folder; choose another place for the output")
        try:
            with tempfile.TemporaryFile(dir=folder):
                return
        except OSError as error:
            raise PermissionError(
                f"cannot write to the folder {folder} ({error.strerror}); choose another place for the output"
            ) from error
    check_writable(folder.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
