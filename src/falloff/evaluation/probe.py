"""A look at a model's attention while a dense run goes on, which changes nothing in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from falloff.methods.base import Call, Dense, Method, State
from falloff.schedule import Schedule


class Observer(Protocol):
    """Sees calls. ``state`` is the observer's own, for one (layer, branch), empty when a run starts."""

    def see(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Probe(Method):
    """Answers every call with ``Dense``, and shows those of some steps to observers.

    steps: how many, spread evenly over the run; all of them where a run's length is unknown.
    """

    name: ClassVar[str] = "probe"
    schedule: ClassVar[Schedule] = Schedule(dense_first=0, dense_last=0, dense_layers=())

    observers: tuple[Observer, ...]
    steps: int = 3

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps = {self.steps} must be at least 1")

    def settings(self) -> dict[str, Any]:
        return {"steps": self.steps}

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Dense:
        if self._looks_at(call):
            for place, observer in enumerate(self.observers):
                observer.see(call, q_BHND, k_BHND, v_BHND, state.values.setdefault(place, State()))
        return Dense(self.name)

    def _looks_at(self, call: Call) -> bool:
        if call.step is None or call.steps is None:
            return True
        return call.step in {int((i + 0.5) * call.steps / self.steps) for i in range(self.steps)}


def draw(count: int, below: int, call: Call, seed: int) -> Tensor:
    """``count`` random whole numbers below a bound, the same whenever the same call is seen, int64."""
    generator = torch.Generator().manual_seed(hash((seed, call.layer, call.step or 0)) & 0x7FFFFFFF)
    return torch.randint(below, (count,), generator=generator)
