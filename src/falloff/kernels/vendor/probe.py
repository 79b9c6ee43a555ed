"""What foreign kernels need, found without importing them, and what they refuse in common."""

from __future__ import annotations

import sys
from collections.abc import Container
from functools import cache
from importlib.util import find_spec

import torch

from falloff.kernels.needs import Needs

BY_NAME = "by name only until a committed measurement shows it faster"
HALVES = (torch.float16, torch.bfloat16)


@cache
def missing(module: str, remedy: str) -> str | None:
    """Why a module cannot be imported, and what to do about it."""
    try:
        found = module in sys.modules or find_spec(module) is not None
    except ModuleNotFoundError:  # the package above it
        found = False
    return None if found else f"{module} is not installed; {remedy}"


def wrong_gpu(archs: tuple[int, ...], device: torch.device | None = None) -> str | None:
    """Why the GPU (the current one unless given) is not of one of these compute capabilities, 90 for 9.0."""
    if device is not None and device.type != "cuda":
        return f"it runs on CUDA GPUs, the tensors are on {device}"
    if not torch.cuda.is_available():
        return "it runs on CUDA GPUs, none was found"
    if (have := arch(device)) in archs:
        return None
    return f"it runs on GPUs of compute capability {spoken(*archs)}, this one has {spoken(have)}"


def arch(device: torch.device | None = None) -> int:
    """The compute capability of a GPU as one number: 90 for 9.0."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def spoken(*archs: int) -> str:
    return ", ".join(f"{a // 10}.{a % 10}" for a in archs)


def wrong_type(needs: Needs, dtypes: Container[torch.dtype], head_dims: Container[int]) -> str | None:
    """Why the element type or head size is not one of these."""
    if (dtype := needs.q_BHND.dtype) not in dtypes:
        return f"it does not compute in {dtype}"
    if (head_dim := needs.q_BHND.shape[3]) not in head_dims:
        return f"it does not compute heads of {head_dim} channels"
    return None


def wrong_blocks(needs: Needs, q_block: int, kv_block: int) -> str | None:
    """Why the plan's blocks are not of just this size; a finer kernel takes a plan's ``refine``."""
    plan = needs.plan
    if (plan.q_sizes, plan.kv_sizes) == (q_block, kv_block):
        return None
    if isinstance(plan.q_sizes, int) and isinstance(plan.kv_sizes, int):
        return f"its blocks are {q_block} x {kv_block}, the plan's are {plan.q_sizes} x {plan.kv_sizes}"
    return f"its blocks are {q_block} x {kv_block}, the plan's vary in size"


def unserved(needs: Needs, *, lse: bool = True, grad: bool = False) -> str | None:
    """Why a kernel cannot do what the call asks for besides the output."""
    if needs.drops_keys:
        return "it cannot drop keys (key_valid)"
    if needs.grad and not grad:
        return "it has no backward"
    if needs.lse and not lse:
        return "it gives no LSE"
    return None
