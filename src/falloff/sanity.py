"""Can this be what attention gives? Black, noise and NaN are caught in the layer where they begin.

Whatever the weights, attention's output is a mean of values: finite where its inputs are, nowhere beyond the largest
value, and not vanishing beside them. A look at a call reads its tensors once and leaves four flags on the device,
so that nobody waits for it; they are read when the model's forward is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

VANISHING = 1e-6
"""Root mean square of the outputs / of the values below which a head is black. A mean over a million tokens whose
values are independent still has 1e-3."""
BEYOND = 2.0
"""Largest output / largest value above which a head is noise. Rounding and 8-bit kernels stay within a few percent."""


class OutputError(RuntimeError):
    """A layer put out what attention cannot: NaN, nothing at all, or more than its values hold."""


class Look(NamedTuple):
    """A call that was looked at."""

    where: str
    """The call in words, as ``layer 3, step 12, ...``."""
    kernel: str
    flags: Tensor
    """Bool [4]: output not finite, inputs not finite, vanishing, beyond the values."""


def look(where: str, kernel: str, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, out_BSHD: Tensor) -> Look:
    """Look at a call without waiting for the device."""
    values, outputs = _root_sum(v_BSHD), _root_sum(out_BSHD)
    flags = [
        ~outputs.isfinite().all(),
        ~(_root_sum(q_BSHD).isfinite().all() & _root_sum(k_BSHD).isfinite().all() & values.isfinite().all()),
        (values.isfinite() & (values > 0) & (outputs <= VANISHING * values)).any(),
        (_largest(out_BSHD) > BEYOND * _largest(v_BSHD)).any(),
    ]
    return Look(where, kernel, torch.stack(flags))


def judge(looks: Sequence[Look]) -> None:
    """Read the flags of all looks, which waits for the device once. Raises ``OutputError`` for the first bad one."""
    if not looks:
        return
    for seen, flags in zip(looks, torch.stack([seen.flags for seen in looks]).tolist(), strict=True):
        fault = _fault(*flags)
        if fault is not None:
            raise OutputError(f"the first sparse call of {seen.where} by the kernel {seen.kernel} {fault}")


def _fault(not_finite: bool, inputs_not_finite: bool, vanishing: bool, beyond: bool) -> str | None:
    if not_finite and inputs_not_finite:
        return (
            "was given queries, keys or values with NaN or infinity: the model itself made them. Look at its dtype, "
            "weights, LoRA and quantization; the same run after falloff.disable should show them too"
        )
    if not_finite:
        what = "put out NaN or infinity from finite queries, keys and values"
    elif vanishing:
        what = "put out nothing: next to its values some heads are zero"
    elif beyond:
        what = f"put out more than {BEYOND:g} times its largest value, and attention is a mean of values"
    else:
        return None
    return (
        f"{what}, so that the result would be black or noise. Name another kernel (falloff.enable(..., kernel=...), "
        "see falloff doctor), or falloff.disable; please report it with the output of falloff doctor"
    )


def _root_sum(x_BSHD: Tensor) -> Tensor:
    """Root of the sum of squares of every head, [B, H], at least in float32; its NaN and infinity are those of x."""
    wide = torch.promote_types(x_BSHD.dtype, torch.float32)
    # Channel by channel first: over both axes at once a CPU takes three times as long.
    norms: Tensor = torch.linalg.vector_norm(torch.linalg.vector_norm(x_BSHD.detach(), dim=3, dtype=wide), dim=1)
    return norms


def _largest(x_BSHD: Tensor) -> Tensor:
    """Largest magnitude of every head, [B, H]; several times faster on a CPU than the norm of that name."""
    x = x_BSHD.detach()
    return torch.maximum(x.amax(dim=(1, 3)), -x.amin(dim=(1, 3)))
