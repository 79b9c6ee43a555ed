"""What every table of figures is made with."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(result: dict[str, Any], path: Path, start: str = "") -> str:
    """Where figures come from. ``start``: the way from the page to the repository's root."""
    machine, versions = result["machine"], result["versions"]
    link = f"[{path.name}]({start}{path.relative_to(ROOT)})"
    if machine["device"] != "cpu":
        return f"{link}: {machine['device']}, torch {versions['torch']}, triton {versions['triton']}."
    return (
        f"{link}: {machine['processor']}, {machine['threads']} threads, {machine['vector instructions']}, "
        f"torch {versions['torch']}."
    )
