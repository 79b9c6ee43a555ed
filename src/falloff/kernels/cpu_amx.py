"""Block-sparse attention by the matrix tiles (AMX) of Intel CPUs since Sapphire Rapids, in C++ of our own (simd/).

The formulas are cpu_simd.py's. Tiles multiply bfloat16 and add up float32. bfloat16 tensors are multiplied as they are;
weights, and gradients of scores, are rounded to bfloat16 for their products, as flash attention does. A float16 number
is taken apart into two bfloat16. Three would hold a float32: their six products took as long as cpu_simd.py's one.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from falloff.kernels import compiled
from falloff.kernels.cpu_simd import Library, attend, unfilled
from falloff.kernels.needs import Needs
from falloff.kernels.simd_call import channels_together
from falloff.kernels.trial import Trial
from falloff.plan import Plan

SOURCE = Path(__file__).parent / "simd" / "amx.cpp"
PARTS = {torch.bfloat16: 1, torch.float16: 2}
"""How many bfloat16 a number is."""


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference. Differentiable through out and LSE."""
    library = Library(SOURCE, PARTS[q_BHND.dtype])
    q, k, v = (channels_together(x.float()) for x in (q_BHND, k_BHND, v_BHND))
    out, lse = attend(library, plan, q, k, v, scale, key_valid_BN)
    return out.to(q_BHND.dtype), lse


def absent() -> str | None:
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not compiled.offers("amx_tile", unknown=True):
        return "the CPU has no AMX, or PyTorch was told not to use its vectors"
    made = compiled.library(SOURCE)
    if isinstance(made, compiled.CompileError):
        return str(made)
    return None if made.falloff_able() else "the CPU has no AMX, or the system keeps it from programs"


def refuse(needs: Needs) -> str | None:
    if needs.q_BHND.device.type != "cpu":
        return f"it runs on CPUs, the tensors are on {needs.q_BHND.device}"
    if needs.q_BHND.dtype not in PARTS:
        return f"it multiplies bfloat16 and float16, the tensors are {needs.q_BHND.dtype}"
    return None


def unsuited(needs: Needs) -> str | None:
    if needs.plan.summary:
        return "means of skipped blocks are computed apart from it"
    return unfilled(needs.plan, SOURCE)


def trial() -> Trial:
    return Trial(torch.device("cpu"), torch.bfloat16, 64, 128, 128)
