"""Every way to run a transformer's self-attention: as it is, by another dense attention, by a method."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from falloff import api, kernels
from falloff.evaluation.bench import dense
from falloff.evaluation.bench.arms import NO_PEER
from falloff.evaluation.bench.models import Inputs
from falloff.evaluation.bench.timing import Arm, BenchmarkError, once
from falloff.evaluation.machine import PeakMemory
from falloff.hosts import host_for
from falloff.methods import Call, Full, Method, State
from falloff.plan import Plan, dense_plan
from falloff.schedule import Schedule

NO_DENSE = Schedule(dense_first=0, dense_last=0, dense_layers=())
AS_IT_IS = "dense"


@dataclass(frozen=True, kw_only=True)
class EveryBlock(Method):
    """Full attention through our own kernels: a dense peer."""

    name: ClassVar[str] = "every block"
    static: ClassVar[bool] = True

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        return dense_plan(call.sequence.tokens, call.sequence.tokens)


class Instead(TorchFunctionMode):
    """Computes torch's attention calls by another dense attention. Drops masks: the inputs here keep every token."""

    def __init__(self, attend: dense.Attend) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and "query" in kwargs:  # as diffusers calls it
            return self._attend(kwargs["query"], kwargs["key"], kwargs["value"])
        return func(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Way:
    """Dense through ``attend`` (as it is when that is ``None``), or a method by a kernel."""

    kind: str
    attend: dense.Attend | None = None
    method: Method | None = None
    kernel: str = "auto"

    def instead(self) -> AbstractContextManager[object]:
        return nullcontext() if self.attend is None else Instead(self.attend)


class Ways(NamedTuple):
    """Ways that may run, and why others cannot."""

    ways: dict[str, Way]
    refused: dict[str, str]


class Observed(NamedTuple):
    """One forward: its seconds, those inside self-attention, calls by kernel, and its peak memory in bytes."""

    seconds: float
    attention_seconds: float
    kernels: dict[str, int]
    peak_bytes: int | None

    @property
    def share(self) -> float:
        """Of attention, 0 to 1."""
        return min(1.0, self.attention_seconds / self.seconds)


def ways_of(method: Method, plan: Plan, q_BHND: Tensor, names: Sequence[str], *, masked: bool) -> Ways:
    """The model as it is, dense peers, and the method by each of the kernels named ("auto" takes the preferred one).

    ``q_BHND``: queries such as the model will have. ``masked``: the model calls attention with a mask, so that it is
    a peer of its own without. A kernel that can run the plan is a dense peer as well, with every block on.
    """
    peers, refused = dense.peers(q_BHND.device)
    if not masked:
        del peers["sdpa"]  # the model as it is
    ways = {AS_IT_IS: Way(kind="dense")}
    ways |= {f"dense, {name}": Way(kind="dense", attend=attend) for name, attend in peers.items()}
    for name in names:
        try:
            chosen = kernels.choose(plan, q_BHND, impl=name, needs_lse=False).name
        except kernels.UnsupportedError as error:
            refused[f"{method.name}, {name}"] = str(error)
            continue
        if chosen not in NO_PEER:
            ways[f"dense, {chosen}"] = Way(kind="dense", method=EveryBlock(), kernel=chosen)
        ways[f"{method.name}, {chosen}"] = Way(kind="sparse", method=method, kernel=chosen)
    return Ways(ways, refused)


class Runner:
    """A transformer and the inputs of its forward."""

    def __init__(self, made: nn.Module, inputs: Inputs) -> None:
        self._made, self._inputs = made, inputs
        self.layers = len(host_for(made).attention_paths(made))

    def forward(self) -> Tensor:
        out: Tensor = self._made(**self._inputs, return_dict=False)[0]
        return out

    def arm(self, way: Way) -> Arm:
        method = way.method
        if method is None:
            return Arm(self.forward, around=way.instead)
        return Arm(self.forward, around=lambda: self._attached(way, method))

    def observe(self, way: Way, device: torch.device) -> Observed:
        """A forward with its self-attention timed."""
        with way.instead(), self._attached(way, way.method or Full(), timing=True):
            memory = PeakMemory(device)
            (seconds,) = once(Arm(self.forward), device)
            calls = api.report(self._made).calls[-self.layers :]
        attention = sum(call.attention_seconds or 0.0 for call in calls)
        return Observed(seconds, attention, dict(Counter(call.kernel for call in calls)), memory.read())

    @contextmanager
    def _attached(self, way: Way, method: Method, timing: bool = False) -> Iterator[None]:
        """With plans made and everything derived from them, as from the second step of a run on.

        Raises ``BenchmarkError`` when calls stayed dense that the method should have planned.
        """
        with api.using(self._made, method, schedule=NO_DENSE, kernel=way.kernel, timing=timing):
            if way.method is not None:
                self.forward()
                reasons = api.report(self._made).reasons
                if reasons:
                    raise BenchmarkError(f"calls stayed dense: {reasons}")
            yield
