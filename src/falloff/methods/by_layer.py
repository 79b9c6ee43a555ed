"""One method whose layers differ in one setting: layers that lose little by sparsity pay for those that lose much.

How much of its attention a layer needs differs from layer to layer far more than from prompt to prompt, so that
``falloff tune`` measures it once and writes it down.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from falloff.methods.base import Call, Dense, Method, State
from falloff.methods.nested import Given, ask, method_of, plain
from falloff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class ByLayer(Method):
    """A method with a value of its own of one setting in every layer.

    method: the method, its name for default settings, or {"name": ..., setting: value}.
    setting: the one in which layers differ.
    values: of that setting, one for every layer; without any, all layers have the method's own.
    """

    name: ClassVar[str] = "by-layer"

    method: Given = "sparge"
    setting: str = "keep"
    values: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "method", method_of(self.method))
        object.__setattr__(self, "values", tuple(self.values))
        if self.setting not in self.base.settings():
            known = ", ".join(self.base.settings()) or "none"
            raise ValueError(f"setting = {self.setting!r} is none of {self.base.name}, which has {known}")
        for layer in range(len(self.values)):
            self.of(layer)

    @property
    def base(self) -> Method:
        """The method itself."""
        assert isinstance(self.method, Method)
        return self.method

    def settings(self) -> dict[str, Any]:
        return {"method": plain(self.base), "setting": self.setting, "values": self.values}

    def of(self, layer: int) -> Method:
        """The method as a layer has it. Raises ``ValueError`` for an illegal value."""
        return dataclasses.replace(self.base, **{self.setting: self.values[layer]}) if self.values else self.base

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        if self.values and len(self.values) != call.layers:
            raise ValueError(f"values are for {len(self.values)} layers, the model has {call.layers}")
        return ask(self.of(call.layer), "own", call, (q_BHND, k_BHND, v_BHND), state)
