"""A router over methods: every head takes the one whose output on a few queries comes nearest to dense attention.

Generalises the choice of Sparse VideoGen (arXiv:2502.01776, section 4.2) from its two bands to any methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.nested import Given, ask, method_of, plain
from falloff.methods.radial import Radial
from falloff.methods.routing import output_errors, route, sampled_queries
from falloff.methods.svg1 import SVG1
from falloff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Router(Method):
    """A choice for every head, made anew at every call.

    candidates: methods, their names for default settings, or {"name": ..., setting: value}. Those that keep a call
        dense are out of it.
    tolerance: a head takes its sparsest candidate among those whose error is at most this above the least; errors
        are shares of the dense output's energy.
    rows: queries that candidates are tried on; seed: of their choice.
    """

    name: ClassVar[str] = "router"
    needs_frames: ClassVar[bool] = True
    knobs: ClassVar[Mapping[str, Span | Choices]] = {"tolerance": Span(0.0, 0.3), "rows": Choices((16, 64))}

    candidates: tuple[Given, ...] = field(default=(Radial(), SVG1()))
    tolerance: float = 0.0
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.candidates if isinstance(self.candidates, tuple | list) else (self.candidates,)
        object.__setattr__(self, "candidates", tuple(method_of(candidate) for candidate in given))
        if not self.candidates:
            raise ValueError("candidates is empty; name at least one method to choose from")
        learning = [each.name for each in self.candidates if isinstance(each, Method) and each.learns]
        if learning:
            raise ValueError(f"candidates = {', '.join(learning)} have trained parameters; a router takes plans alone")
        if not self.tolerance >= 0.0:
            raise ValueError(f"tolerance = {self.tolerance} is negative; 0.0 takes the least error alone")
        for name, least in (("rows", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} = {value!r} must be a whole number of at least {least}")

    def settings(self) -> dict[str, Any]:
        """Candidates with default settings by their names."""
        plainly = [plain(candidate) for candidate in self.candidates if isinstance(candidate, Method)]
        return {"candidates": plainly, "tolerance": self.tolerance, "rows": self.rows, "seed": self.seed}

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        answers = [
            ask(candidate, ("candidate", number), call, (q_BHND, k_BHND, v_BHND), state)
            for number, candidate in enumerate(self.candidates)
            if isinstance(candidate, Method)
        ]
        plans = tuple(answer for answer in answers if isinstance(answer, Plan))
        if not plans:
            return next(answer for answer in answers if isinstance(answer, Dense))
        queries = sampled_queries(call.sequence, self.rows, self.seed).to(q_BHND.device)
        errors = output_errors(plans, call.sequence, q_BHND, k_BHND, v_BHND, queries)
        return route(plans, errors, state, self.tolerance)
