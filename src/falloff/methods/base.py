"""What a method is: frozen settings that turn one attention call into a plan."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from falloff.geometry import Sequence
from falloff.methods.branch import Branch, Layer
from falloff.plan import Plan
from falloff.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class Call:
    """One self-attention call: its tokens, and where in the model and the run it stands.

    ``first_head``: number in the model of the first head that is given, where processes share the heads.
    """

    sequence: Sequence
    layer: int = 0
    layers: int = 1
    step: int | None = None
    steps: int | None = None
    branch: str | None = None
    first_head: int = 0


@dataclass(frozen=True)
class Dense:
    """A method's answer that a call is better computed dense, and why."""

    reason: str


@dataclass
class State:
    """What a method keeps between its calls; emptied when a run starts.

    values: for one (session, layer, branch). shared: for all calls of the session. trained: the parameters of the
    layer, for a method that has some.
    """

    values: dict[Hashable, Any] = field(default_factory=dict)
    shared: dict[Hashable, Any] = field(default_factory=dict)
    trained: Branch | None = None


@dataclass(frozen=True)
class Span:
    """A setting worth trying anywhere from ``low`` to ``high``; whole numbers where both are. ``log``: by ratio."""

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True)
class Choices:
    """A setting worth trying at these values."""

    values: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Settings of a method. Subclasses are frozen dataclasses; equal settings are equal methods."""

    name: ClassVar[str]
    """How the command line and recipes call it."""
    static: ClassVar[bool] = False
    """Plans depend on the sequence alone, so that one plan serves every layer, step and branch."""
    needs_frames: ClassVar[bool] = False
    """Plans between frames alone, so that it has nothing to leave out of an image."""
    schedule: ClassVar[Schedule] = Schedule()
    """What stays dense unless the user says otherwise."""
    knobs: ClassVar[Mapping[str, Span | Choices]] = {}
    """Settings that trade fidelity for time, and where to look for good ones."""
    dial: ClassVar[str | None] = None
    """The one knob, a ``Span``, that takes plans from sparse to dense, and that layers may thus differ in."""

    @abstractmethod
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        """The plan for one call. A static method must not read q, k or v."""

    @property
    def learns(self) -> bool:
        """Whether every layer gets parameters of its own, made by ``branch``."""
        return False

    def branch(self, layer: Layer) -> Branch:
        """New parameters for one layer, on the CPU. Only of a method that learns."""
        raise NotImplementedError(f"{self.name} learns nothing")

    @property
    def branch_settings(self) -> dict[str, Any]:
        """The settings that trained parameters are of: with others they mean something else."""
        return {}

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, for JSON and YAML; ``type(m)(**m.settings()) == m``."""
        return dataclasses.asdict(self)


def plan_for(method: Method, sequence: Sequence) -> Plan:
    """The plan of a static method for a sequence, for use without a model.

    Raises ``ValueError`` for a method that looks at queries and keys, and for one that keeps this sequence dense.
    """
    if not method.static:
        raise ValueError(f"{method.name} plans from queries and keys; call its plan() with them")
    nothing = torch.empty(0)
    plan = method.plan(Call(sequence=sequence), nothing, nothing, nothing, State())
    if isinstance(plan, Dense):
        raise ValueError(f"{method.name} has no plan for {sequence}: {plan.reason}")
    return plan
