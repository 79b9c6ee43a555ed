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
from falloff.methods.radial import Radial
from falloff.methods.routing import output_errors, route, sampled_queries
from falloff.methods.svg1 import SVG1
from falloff.plan import Plan

Candidate = str | Method | dict[str, Any]


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

    candidates: tuple[Candidate, ...] = field(default=(Radial(), SVG1()))
    tolerance: float = 0.0
    rows: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        given = self.candidates if isinstance(self.candidates, tuple | list) else (self.candidates,)
        object.__setattr__(self, "candidates", tuple(_method(candidate) for candidate in given))
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
        plain = [_plain(candidate) for candidate in self.candidates if isinstance(candidate, Method)]
        return {"candidates": plain, "tolerance": self.tolerance, "rows": self.rows, "seed": self.seed}

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        answers = [
            self._answer(number, candidate, call, (q_BHND, k_BHND, v_BHND), state)
            for number, candidate in enumerate(self.candidates)
            if isinstance(candidate, Method)
        ]
        plans = tuple(answer for answer in answers if isinstance(answer, Plan))
        if not plans:
            return next(answer for answer in answers if isinstance(answer, Dense))
        queries = sampled_queries(call.sequence, self.rows, self.seed).to(q_BHND.device)
        errors = output_errors(plans, call.sequence, q_BHND, k_BHND, v_BHND, queries)
        return route(plans, errors, state, self.tolerance)

    def _answer(
        self, number: int, candidate: Method, call: Call, tensors: tuple[Tensor, Tensor, Tensor], state: State
    ) -> Plan | Dense:
        """A candidate's own plan; a static one's is the same for every layer and step."""
        q = tensors[0]
        if not candidate.static:
            own = state.values.setdefault(("candidate", number), State(shared=state.shared))
            return candidate.plan(call, *tensors, own)
        key = (candidate, call.sequence, q.device)
        if key not in state.shared:
            made = candidate.plan(call, *tensors, State())
            state.shared[key] = made.to(q.device) if isinstance(made, Plan) else made
        answer: Plan | Dense = state.shared[key]
        return answer


def _method(candidate: Candidate) -> Method:
    from falloff.methods import get  # which knows this file

    if isinstance(candidate, Method):
        return candidate
    if isinstance(candidate, str):
        return get(candidate)
    if isinstance(candidate, dict) and "name" in candidate:
        return get(**candidate)
    raise ValueError(f'candidates must be methods, names or {{"name": ..., setting: value}}, got {candidate!r}')


def _plain(method: Method) -> str | dict[str, Any]:
    usual = type(method)().settings()
    changed = {name: value for name, value in method.settings().items() if value != usual[name]}
    return {"name": method.name, **changed} if changed else method.name
