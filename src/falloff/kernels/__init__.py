"""Kernels: code that runs a plan on queries, keys and values."""

from __future__ import annotations

from torch import Tensor

from falloff.kernels.check import check_call
from falloff.kernels.choose import Choice, available, choose, kernel_named
from falloff.kernels.errors import KernelError, UnsupportedError
from falloff.kernels.merge import merge
from falloff.kernels.needs import differentiable
from falloff.kernels.summary import with_summary
from falloff.plan import Plan

__all__ = ["Choice", "KernelError", "UnsupportedError", "attend", "available", "choose", "dispatch", "merge", "run"]


def run(
    plan: Plan,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the plan's pairs of tokens: out [B, H, Nq, D] in q's dtype, LSE [B, H, Nq].

    Tokens are given and returned in the caller's order; the plan's orders are applied inside. ``scale`` defaults
    to ``D ** -0.5``. ``key_valid`` bool [B, Nkv] drops keys (padding) whatever they hold. The LSE is the natural
    logarithm of the sum of exponentials of the scaled logits, float32 (float64 for float64); a query without keys
    gives 0 and -inf. Differentiable in q, k and v through both results, unless the plan has ``skip`` set.

    Raises ``KernelError`` when the tensors do not fit the plan, ``UnsupportedError`` when the kernel named by
    ``impl`` cannot run the call, or a gradient is asked of a plan with ``skip``.
    """
    out, lse, _ = dispatch(plan, q_BHND, k_BHND, v_BHND, scale=scale, key_valid=key_valid, impl=impl, needs_lse=True)
    assert lse is not None  # a kernel without one refuses
    return out, lse


def attend(
    plan: Plan,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """As ``run`` for callers without need of an LSE, whom more kernels serve: out [B, H, Nq, D]."""
    return dispatch(plan, q_BHND, k_BHND, v_BHND, scale=scale, key_valid=key_valid, impl=impl, needs_lse=False)[0]


def dispatch(
    plan: Plan,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    scale: float | None,
    key_valid: Tensor | None,
    impl: str,
    needs_lse: bool,
) -> tuple[Tensor, Tensor | None, Choice]:
    """What ``run`` and ``attend`` do: out, the LSE (perhaps ``None`` where it is not needed), and the choice made."""
    check_call(plan, q_BHND, k_BHND, v_BHND, key_valid)
    needs_grad = differentiable(q_BHND, k_BHND, v_BHND)
    if plan.skip is not None and needs_grad:
        raise UnsupportedError("blocks left out on the way have no gradient; for training give a plan with skip=None")
    choice = choose(
        plan,
        q_BHND,
        impl=impl,
        needs_grad=needs_grad,
        needs_lse=needs_lse or plan.summary,
        drops_keys=key_valid is not None,
    )
    scale = q_BHND.shape[-1] ** -0.5 if scale is None else scale
    kernel = kernel_named(choice.name)
    out, lse = kernel.attention(plan, q_BHND, k_BHND, v_BHND, scale, key_valid)
    if plan.summary and not kernel.summarises:
        assert lse is not None  # it was asked for
        out, lse = with_summary(plan, q_BHND, k_BHND, v_BHND, scale, key_valid, (out, lse))
    return out, lse, choice
