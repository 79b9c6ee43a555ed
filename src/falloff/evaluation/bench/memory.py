"""Work that cannot fit is refused before anything is allocated."""

from __future__ import annotations

import torch

from falloff.evaluation.bench.timing import BenchmarkError
from falloff.evaluation.machine import free_bytes


def fits(needed: float, device: torch.device) -> bool:
    """Whether so many bytes are free on a device; true where nobody can tell."""
    free = free_bytes(device)
    return free is None or needed <= free


def require(needed: float, device: torch.device, what: str) -> None:
    """Raise ``BenchmarkError`` unless so many bytes are free on a device."""
    if not fits(needed, device):
        free = free_bytes(device) or 0
        raise BenchmarkError(
            f"{what} needs about {gigabytes(needed)} of memory and {device} has {gigabytes(free)} free; "
            "choose a smaller shape or another device"
        )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
