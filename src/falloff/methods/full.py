"""Full attention: every call stays on the model's own backend. The baseline, with a report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from falloff.methods.base import Call, Dense, Method, State


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Keeps all attention dense; what other methods are measured against."""

    name: ClassVar[str] = "dense"
    static: ClassVar[bool] = True

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Dense:
        return Dense("method keeps attention dense")
