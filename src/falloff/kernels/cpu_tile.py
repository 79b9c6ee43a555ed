"""bfloat16 tiles on CPUs with bfloat16 matrix products: gather, scores, softmax, product, all in bfloat16.

Several times faster than the flash operator there, which multiplies bfloat16 no faster than float32; without those
instructions ten times slower than dense. Forward only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from falloff.kernels import compiled
from falloff.kernels.cpu import fit_scores, in_units, over_chunks
from falloff.kernels.cpu import refuse as refuse_device
from falloff.kernels.launch import Launch
from falloff.kernels.needs import Needs
from falloff.plan import Plan

SHIFT_KEYS = 128  # enough keys that their largest score is near the row's


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference but for scores rounded to bfloat16: about twice the error of a bfloat16 flash kernel."""

    def core(lists: Launch, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return over_chunks(tile, fit_scores(lists.q_unit), scale, lists, q, k, v)

    return in_units(plan, q_BHND, k_BHND, v_BHND, key_valid_BN, core)


def absent() -> str | None:
    """Why this machine cannot run it at a gain; ``None`` where it can."""
    if any(compiled.offers(each, unknown=False) for each in ("avx512_bf16", "amx_tile")):
        return None
    return "the CPU has neither AVX-512 BF16 nor AMX; without them it is slower than dense attention"


def unsuited(needs: Needs) -> str | None:
    """By AMX the flash operator is fast, and products of tiles this small are not (benchmarks/results)."""
    amx = compiled.offers("amx_tile", unknown=False)
    return "the CPU has AMX, by which PyTorch's flash operator is faster" if amx else None


def refuse(needs: Needs) -> str | None:
    if needs.q_BHND.dtype != torch.bfloat16:
        return f"it computes in bfloat16, the tensors are {needs.q_BHND.dtype}"
    if needs.grad:
        return "it has no backward"
    return refuse_device(needs)


def tile(q_RND: Tensor, k_RMD: Tensor, v_RMD: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over rows with scores shifted by each query's largest score against the first keys.

    bfloat16 keeps 8 bits of a score: near zero, where the largest then lie, their absolute error is small. The LSE
    comes from the largest weight, ``lse = shift + max(s) - log(max(P))``, which cannot underflow.
    """
    shift = scale * (q_RND @ k_RMD[:, :SHIFT_KEYS].mT).amax(-1, keepdim=True)
    scores = torch.baddbmm(-shift, q_RND, k_RMD.mT, alpha=scale)
    weights = scores.softmax(-1)
    lse = shift.float() + scores.amax(-1, keepdim=True).float() - weights.amax(-1, keepdim=True).float().log()
    return weights @ v_RMD, lse[..., 0]
