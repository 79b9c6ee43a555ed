"""Results of long work kept in a folder, so that it goes on where it was interrupted."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from falloff.evaluation import files

T = TypeVar("T")


class Kept:
    """One file for every result; without a folder nothing is kept.

    Files are pickles: give a folder that nobody else writes to.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        if folder is not None:
            files.check_writable(folder)
            folder.mkdir(parents=True, exist_ok=True)

    def has(self, key: str) -> bool:
        return self._folder is not None and self._file(self._folder, key).exists()

    def once(self, key: str, make: Callable[[], T]) -> T:
        """The result kept under a key, else what ``make`` gives, which is kept from then on."""
        if self._folder is None:
            return make()
        file = self._file(self._folder, key)
        if file.exists():
            kept: T = pickle.loads(file.read_bytes())
            return kept
        made = make()
        files.write(file, pickle.dumps(made))
        return made

    @staticmethod
    def _file(folder: Path, key: str) -> Path:
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.pickle"
