"""What foreign kernels need, found without importing them, and what they refuse in common."""

from __future__ import annotations

import sys
from collections.abc import Container
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import torch

from falloff.kernels.needs import Needs

BY_NAME = "by name only until a committed measurement shows it faster"
HALVES = (torch.float16, torch.bfloat16)


@cache
def missing(module: str, remedy: str) -> str | None:
    """Why a module cannot be imported, and what to do about it."""
    return None if module in sys.modules or _found(module) else f"{module} is not installed; {remedy}"


def _found(module: str) -> bool:
    """Whether a module is there; Python's own search would import the package that holds it."""
    root, *inner = module.split(".")
    spec = find_spec(root)
    if spec is None or not inner:
        return spec is not None
    return any(Path(folder, *inner).is_dir() for folder in spec.submodule_search_locations or ())


def arch(device: torch.device | None = None) -> int | None:
    """The compute capability of a CUDA GPU (the current one unless given) as one number, 90 for 9.0."""
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def wrong_gpu(archs: tuple[int, ...], device: torch.device | None = None) -> str | None:
    """Why a GPU (the current one unless given) is not of one of these compute capabilities."""
    have = arch(device)
    if have in archs:
        return None
    if have is not None:
        return f"it runs on GPUs of compute capability {_spoken(*archs)}, this one has {_spoken(have)}"
    return "it runs on CUDA GPUs, " + ("none was found" if device is None else f"the tensors are on {device}")


def _spoken(*archs: int) -> str:
    return ", ".join(f"{a // 10}.{a % 10}" for a in archs)


def wrong_type(needs: Needs, dtypes: Container[torch.dtype], head_dims: Container[int]) -> str | None:
    """Why the element type or head size is not one of these."""
    if (dtype := needs.q_BHND.dtype) not in dtypes:
        return f"it does not compute in {dtype}"
    if (head_dim := needs.q_BHND.shape[3]) not in head_dims:
        return f"it does not compute heads of {head_dim} channels"
    return None


def wrong_blocks(needs: Needs, q_tile: int, kv_tile: int) -> str | None:
    """Why the plan's blocks cannot be cut into tiles of this size."""
    plan = needs.plan
    if not isinstance(plan.q_sizes, int) or not isinstance(plan.kv_sizes, int):
        return "its blocks are of one size, the plan's vary"
    if plan.q_sizes % q_tile or plan.kv_sizes % kv_tile:
        return f"it takes blocks that are multiples of {q_tile} x {kv_tile}, got {plan.q_sizes} x {plan.kv_sizes}"
    return None


def unserved(needs: Needs, *, lse: bool = True, grad: bool = False) -> str | None:
    """Why a kernel cannot do what the call asks for besides the output."""
    if needs.drops_keys:
        return "it cannot drop keys (key_valid)"
    if needs.grad and not grad:
        return "it has no backward"
    if needs.lse and not lse:
        return "it gives no LSE"
    return None
