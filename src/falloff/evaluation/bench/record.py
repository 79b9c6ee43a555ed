"""What a benchmark leaves behind: its rows, and all that is needed to read and repeat them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from falloff.evaluation import files
from falloff.evaluation.machine import describe, versions


def write(path: Path, command: str, device: torch.device, rows: Iterable[Mapping[str, Any]]) -> None:
    """Put rows with machine, versions and command in a JSON file, whose folder is made where it is missing.

    Raises ``OSError`` when it cannot be written.
    """
    result = {"command": command, "machine": describe(device), "versions": versions(), "rows": list(rows)}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(result, indent=1, allow_nan=False) + "\n")
