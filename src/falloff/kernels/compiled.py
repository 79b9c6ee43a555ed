"""C++ of our own, compiled on the machine it runs on at its first use, and kept in the user's cache.

Compiled for the vector instructions that PyTorch uses here, which ``ATEN_CPU_CAPABILITY`` can lower. Without a
compiler there is a reason instead of a library; nothing is downloaded and nothing is needed to install falloff.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

COMPILERS = ("g++", "clang++", "c++")
THREAD_WORK = 1 << 20
"""Multiply-adds worth a thread of their own: tens of microseconds."""
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread")
VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
MORE = {"amx": ("-mamx-tile", "-mamx-bf16", "-mavx512bf16")}
"""What the source of a name needs beside them."""


class CompileError(Exception):
    """Why there is no library, in one line."""


@cache
def library(source: Path) -> ctypes.CDLL | CompileError:
    """The compiled source, loaded; found in the cache if the same compiler made it of the same files of its folder."""
    try:
        made = ctypes.CDLL(str(_file(source)))
    except CompileError as error:
        return error
    except (OSError, RuntimeError) as error:  # the second where there is no home
        return CompileError(f"what was compiled cannot be kept or loaded: {error}; XDG_CACHE_HOME names another cache")
    if (parallel := getattr(ctypes.CDLL(None), "GOMP_parallel", None)) is not None:
        made.falloff_use(parallel)  # of the OpenMP that PyTorch has loaded; without one there are threads of our own
    return made


def call(source: Path, name: str, argument: ctypes.Structure) -> None:
    """Run a function of a library that is known to be there, which takes a pointer to what ``argument`` holds."""
    run = getattr(_present(source), name)
    run.argtypes, run.restype = [ctypes.POINTER(type(argument))], None
    run(ctypes.byref(argument))


def runs(source: Path, x: torch.Tensor) -> bool:
    """Whether a library serves a tensor: float32 on a CPU with a C++ compiler."""
    served = x.device.type == "cpu" and x.dtype == torch.float32
    return served and not isinstance(library(source), CompileError)


def offers(instructions: str, *, unknown: bool) -> bool:
    """Whether PyTorch says that this CPU has them; ``unknown`` where this PyTorch does not tell."""
    probe = getattr(torch.cpu, f"_is_{instructions}_supported", lambda: unknown)  # private, so it may go away
    return bool(probe())


def width(source: Path) -> int:
    """Numbers in a vector of a library that is known to be there."""
    found: int = _present(source).falloff_width()
    return found


def threads(work: int) -> int:
    """How many threads multiply-adds are worth, of those that PyTorch may use."""
    return min(torch.get_num_threads(), 1 + work // THREAD_WORK)


def _present(source: Path) -> ctypes.CDLL:
    made = library(source)
    assert not isinstance(made, CompileError)  # callers have asked
    return made


def _file(source: Path) -> Path:
    command = [*_compiler(), *OPTIONS, *_vector_options(), *MORE.get(source.stem, ())]
    mark = hashlib.sha256("\0".join([*command, _version(command[0])]).encode())
    for file in sorted(source.parent.glob("*.?pp")):
        mark.update(file.read_bytes())
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "falloff"
    made = folder / f"{source.stem}-{mark.hexdigest()[:16]}.so"
    if not made.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            part = Path(unfinished) / made.name
            _run([*command, str(source), "-o", str(part)])
            os.replace(part, made)  # at once, for processes that look for it at the same time
    return made


def _compiler() -> list[str]:
    chosen = shlex.split(os.environ.get("CXX", ""))
    names = [chosen[0]] if chosen else COMPILERS
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise CompileError(f"no C++ compiler ({', '.join(names)}) was found; install one or set CXX")
    return [found, *chosen[1:]]


def _vector_options() -> tuple[str, ...]:
    """Spelled out, not "native": a cache may be shared by machines."""
    capability = torch.backends.cpu.get_cpu_capability()
    return next((options for name, options in VECTORS.items() if capability.startswith(name)), ())


def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        line = next((line for line in lines if "error" in line), lines[0] if lines else f"status {done.returncode}")
        raise CompileError(f"{Path(command[0]).name} failed: {line}")
    return done.stdout
