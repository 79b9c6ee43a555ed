"""What a figure was measured on, and how much memory it took."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from falloff.kernels import cpu_amx

PACKAGES = ("falloff", "torch", "triton", "diffusers", "transformers", "numpy")
VENDORS = ("nvidia-cudnn-frontend", "flash-attn-4", "flashinfer-python")


def versions() -> dict[str, str]:
    """Version of Python and of every package that a figure depends on; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *VENDORS):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def describe(device: torch.device) -> dict[str, str]:
    """The machine in words."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": str(_cores()),
        "threads": str(torch.get_num_threads()),
        "vector instructions": torch.backends.cpu.get_cpu_capability() + (", AMX" if cpu_amx.absent() is None else ""),
        "system": f"{platform.system()} {platform.machine()}",
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock may be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class PeakMemory:
    """Peak memory from construction to ``read``, the weights included.

    On CUDA what torch had allocated at most; elsewhere the process's resident memory, which is unknown (``None``)
    where the operating system does not tell.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        _restart_resident_peak()
        self._before = self.read()

    def read(self) -> int | None:
        """Bytes."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _resident_peak()

    def beyond(self) -> int | None:
        """Bytes beyond what was taken at construction."""
        peak = self.read()
        return None if peak is None or self._before is None else peak - self._before


class Others:
    """What others took of all processors from construction to ``read``: other programs, and other guests of a host."""

    def __init__(self) -> None:
        self._before, self._own = _ticks(), time.process_time()

    def read(self) -> float | None:
        """Share of the processors' time, 0 to 1; ``None`` where the operating system does not tell."""
        now = _ticks()
        if now is None or self._before is None or now.all == self._before.all:
            return None
        own = (time.process_time() - self._own) * os.sysconf("SC_CLK_TCK")
        return min(1.0, max(0.0, (now.busy - self._before.busy - own) / (now.all - self._before.all)))


class _Ticks(NamedTuple):
    """Of all processors since the start of the system, busy ones and all."""

    busy: int
    all: int


def _ticks() -> _Ticks | None:
    """Time that the host gave to other guests (steal) is busy; that of our own guests is in user's already."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, idle, waiting, *more = map(int, stat.read_text().partition("\n")[0].split()[1:9])
    busy = user + nice + system + sum(more)
    return _Ticks(busy, busy + idle + waiting)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken on a device; ``None`` where the operating system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    if not info.exists():
        return None
    available = next(line for line in info.read_text().splitlines() if line.startswith("MemAvailable"))
    return int(available.split()[1]) * 1024


def _resident_peak() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _restart_resident_peak() -> None:
    """Linux alone forgets a former peak on request; elsewhere it is the peak of the process so far."""
    control = Path("/proc/self/clear_refs")
    if sys.platform == "linux" and os.access(control, os.W_OK):
        _give_back()
        control.write_text("5")


def _give_back() -> None:
    """Freed memory that the C library still holds would hide as much of the next peak."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
