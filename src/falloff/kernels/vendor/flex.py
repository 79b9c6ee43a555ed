"""FlexAttention, compiled by PyTorch itself: Triton on a GPU, C++ on a CPU (forward only, no LSE).

Two of its traps lead to dense attention without a word: run without compilation, or with more shapes than the
compiler keeps, it ignores block lists. Hence the first is refused, ``fullgraph`` makes the second an error, lengths are
symbols to the compiler, and each combination of everything else has a compiled function of its own.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falloff.kernels.errors import UnsupportedError
from falloff.kernels.kept import kept
from falloff.kernels.kernel import Kernel
from falloff.kernels.needs import Needs, differentiable
from falloff.kernels.trial import Trial
from falloff.kernels.vendor.lists import from_order, in_order, lists
from falloff.kernels.vendor.probe import BY_NAME, HALVES, missing, unserved, wrong_blocks, wrong_type
from falloff.plan import Plan

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

TILE = 64  # the smallest tiles the Triton template runs well on
BACKWARD_TILE = 128  # its backward has no smaller tiles on current GPUs


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    from torch.nn.attention.flex_attention import AuxRequest

    on_cpu = q_BHND.device.type == "cpu"
    grad = differentiable(q_BHND, k_BHND, v_BHND)
    mask = kept(plan, ("flex", grad), lambda: block_mask(plan, transposed=grad))
    more: dict[str, Any] = {} if on_cpu else {"return_aux": AuxRequest(lse=True), "kernel_options": _tiles(plan)}
    run = _compiled(q_BHND.device, q_BHND.dtype, *q_BHND.shape[:2], q_BHND.shape[3], mask.BLOCK_SIZE, scale, grad)
    q = in_order(q_BHND, plan.q_order)
    k, v = (in_order(x, plan.kv_order) for x in (k_BHND, v_BHND))
    result = run(q, k, v, block_mask=mask, scale=scale, **more)
    if on_cpu:
        return from_order(result, plan.q_order), None
    out, aux = result
    return from_order(out, plan.q_order), from_order(aux.lse[..., None], plan.q_order).squeeze(-1)


def block_mask(plan: Plan, *, transposed: bool) -> BlockMask:
    """Every block of the map as one that needs no mask; with their transpose, which the backward reads.

    The list of blocks to be masked is empty but must be of full width, and a tensor of its own.
    """
    from torch.nn.attention.flex_attention import BlockMask

    assert isinstance(plan.q_sizes, int)
    assert isinstance(plan.kv_sizes, int)
    full = lists(plan.blocks, width=plan.blocks.shape[3])
    return BlockMask.from_kv_blocks(
        torch.zeros_like(full.counts),
        torch.zeros_like(full.ids),
        full.counts,
        full.ids,
        BLOCK_SIZE=(plan.q_sizes, plan.kv_sizes),
        seq_lengths=(plan.q_len, plan.kv_len),
        compute_q_blocks=transposed,
    )


def absent() -> str | None:
    if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
        return f"it needs a newer PyTorch, whose torch.compile has isolate_recompiles; this is {torch.__version__}"
    if torch.cuda.is_available():
        return missing("triton", "pip install triton")
    return _cpu_absent()


def refuse(needs: Needs) -> str | None:
    device = needs.q_BHND.device
    if device.type == "cpu":
        why = wrong_blocks(needs, 1, 1) or wrong_type(needs, (torch.float32, *HALVES), range(1, 257))
        return why or unserved(needs, lse=False) or _cpu_absent()
    if device.type != "cuda":
        return f"it runs on CPUs and CUDA GPUs, the tensors are on {device}"
    tile = BACKWARD_TILE if needs.grad else TILE
    why = wrong_blocks(needs, tile, tile) or wrong_type(needs, (torch.float32, *HALVES), range(16, 257))
    return why or unserved(needs, grad=True)


def trial() -> Trial:
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    return Trial(torch.device(device), dtype, 64, 128, 128, lse=on_gpu)


KERNEL = Kernel(
    "flex",
    "FlexAttention: forward and backward on CUDA GPUs, float32 inference on CPUs",
    attention,
    absent,
    refuse,
    by_name=BY_NAME,
    trial=trial,
)


def _cpu_absent() -> str | None:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        return f"on CPUs it needs a C++ compiler at run time, {compiler} was not found; install one or set CXX"
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return f"on CPUs it needs AVX2, this one offers {torch.backends.cpu.get_cpu_capability()}"
    return None


def _tiles(plan: Plan) -> dict[str, int]:
    """Tiles that fit into the blocks; the defaults are for multiples of 128."""
    assert isinstance(plan.q_sizes, int)
    assert isinstance(plan.kv_sizes, int)
    return {} if plan.q_sizes % 128 == plan.kv_sizes % 128 == 0 else {"fwd_BLOCK_M": TILE, "fwd_BLOCK_N": TILE}


@cache
def _compiled(*fixed: Any) -> Callable[..., Any]:
    """The compiled function for all calls that differ in lengths and maps alone."""
    options: Any = {"fullgraph": True, "dynamic": True, "isolate_recompiles": True}
    compiled: Callable[..., Any] = torch.compile(_flex, **options)
    return compiled


def _flex(*given: Any, **more: Any) -> Any:
    if not torch.compiler.is_dynamo_compiling():
        raise UnsupportedError("torch.compile is switched off here, and uncompiled FlexAttention ignores block lists")
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(*given, **more)
