"""Any torch model: sparsify its calls of ``scaled_dot_product_attention`` while a ``with`` block lasts.

For code that is not diffusers', such as Wan's own repository. Nobody tells layers and steps there, so this takes a
plan, or a method whose plans need neither.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from falloff import kernels
from falloff.geometry import Grid, Sequence
from falloff.hosts import autocast
from falloff.kernels.masks import mask_fault, valid_keys
from falloff.methods.base import Method, plan_for
from falloff.plan import Plan


@dataclass
class Calls:
    """What became of the attention calls so far."""

    density: float
    """Of the plan: computed pairs / all pairs."""
    sparse: int = 0
    dense: Counter[str] = field(default_factory=Counter)
    """Calls left alone, by their reason."""

    def __str__(self) -> str:
        told = "".join(f"\n{count} dense: {reason}" for reason, count in self.dense.items())
        return f"{self.sparse} calls at {self.density:.1%} of the pairs{told}"


@contextmanager
def sdpa(
    what: Plan | Method,
    *,
    grid: Grid | tuple[int, int, int] | None = None,
    text: int = 0,
    text_side: Literal["after", "before"] = "after",
    kernel: str = "auto",
) -> Iterator[Calls]:
    """Compute the self-attention calls of one length by a plan; yields a count of them.

    ``what``: a plan, or a method for ``grid`` tokens (frames, height, width) with ``text`` tokens on ``text_side``.
    Calls [B, H, N, D] whose queries and keys number the plan's are sparsified, with their own scale and a mask over
    keys, bool [B, 1, 1, N]; all others are left alone. For steps that are to stay dense, stay outside the block.
    Holds for the calling thread, in eager mode: PyTorch cannot compile under it with full graphs.

    Raises ``ValueError`` for a method that looks at queries and keys or keeps this sequence dense; warns when the
    block ends without a call of the plan's length.
    """
    plan = what if isinstance(what, Plan) else _planned(what, grid, text, text_side)
    if isinstance(what, Plan) and grid is not None:
        raise ValueError("a plan knows its tokens already; give grid with a method only")
    mode = _Mode(plan, kernel)
    with mode:
        yield mode.calls
    if not mode.calls.sparse:
        seen = "; ".join(mode.calls.dense) or "none at all"
        warnings.warn(f"no attention call fitted the plan of {plan.q_len} tokens; seen: {seen}", stacklevel=3)


class _Mode(TorchFunctionMode):
    """Sees every call of a torch function in its thread."""

    def __init__(self, plan: Plan, kernel: str) -> None:
        super().__init__()
        self.plans = {plan.blocks.start.device: plan}
        self.plan = plan
        self.kernel = kernel
        self.calls = Calls(plan.density)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        reason = self._reason(query, key, attn_mask)
        if reason is None and (dropout_p or is_causal or enable_gqa):
            reason = "dropout, causal mask or grouped queries"
        if reason is not None:
            self.calls.dense[reason] += 1
            return scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        self.calls.sparse += 1
        query, key, value = autocast.cast(query, key, value)
        valid = valid_keys(attn_mask, len(query))
        if query.device not in self.plans:  # moving a plan checks it again, which waits for the device
            self.plans[query.device] = self.plan.to(query.device)
        plan = self.plans[query.device]
        return kernels.attend(plan, query, key, value, scale=scale, key_valid=valid, impl=self.kernel)

    def _reason(self, query: Tensor, key: Tensor, mask: Tensor | None) -> str | None:
        if query.ndim != 4:
            return f"queries of {query.ndim} dimensions, expected [B, H, N, D]"
        if query.shape[2] != self.plan.q_len or key.shape[2] != self.plan.kv_len:
            return f"{query.shape[2]} queries and {key.shape[2]} keys"
        return mask_fault(mask)


def _planned(
    method: Method, grid: Grid | tuple[int, int, int] | None, text: int, text_side: Literal["after", "before"]
) -> Plan:
    if not isinstance(method, Method):
        raise TypeError(f"expected a Plan or a Method, got {type(method).__name__}")
    if grid is None:
        raise ValueError(f"{method.name} needs grid=(frames, height, width), the tokens of the latent video")
    return plan_for(method, Sequence(grid if isinstance(grid, Grid) else Grid(*grid), text, text_side))
