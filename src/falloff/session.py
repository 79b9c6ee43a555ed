"""One method at work in the models of one pipeline: its plans, its state, and what every call did.

A host says where a run stands (``begin``) and hands over every self-attention call (``attend``); the session asks
the method for a plan, runs it, or leaves the call to the model's own dense attention, and notes what it did.
"""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from falloff import kernels, sanity
from falloff.geometry import Grid, Sequence
from falloff.kernels.masks import mask_fault, valid_keys
from falloff.kernels.needs import differentiable
from falloff.methods.base import Call, Dense, Method, State
from falloff.methods.branch import Work
from falloff.plan import Plan
from falloff.reporting import Record, Report, Stopwatch
from falloff.schedule import Schedule
from falloff.trained import Trained

PLANS_KEPT = 8
"""Plans of a static method kept at once: one for every size in use."""
RECORDS_KEPT = 100_000
"""Bound on the memory of a run that never ends, as training without a pipeline is one."""


class MethodError(RuntimeError):
    """A method failed to plan a call; says which, and its cause says why."""


class RehearsalError(RuntimeError):
    """What later steps of a run will do failed when it was tried before the first; its cause says why."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a root forward stands. ``step`` or ``steps`` is ``None`` when nobody can tell."""

    run: int = 0
    step: int | None = None
    steps: int | None = None
    branch: str | None = None


@dataclass(frozen=True, kw_only=True)
class Seat:
    """One self-attention layer: layer ``layer`` of ``layers`` in the session's model number ``model``."""

    model: int
    layer: int
    layers: int
    text_side: Literal["after", "before"] | None = None


@dataclass(frozen=True, kw_only=True)
class DenseBackend:
    """The attention a model had before: ``run(q, k, v, mask, scale)``, all [B, S, H, D] but the mask.

    ``name()`` is asked at every call, since a model may follow a default that changes.
    """

    name: Callable[[], str]
    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, float | None], Tensor]


class Session:
    """A method with its schedule and kernel, at work in one or more models.

    ``kernel``: "auto", or the name of the one kernel to use. ``timing``: measure attention and forwards.
    Statistics and the method's state are of the last run only. ``trained``: what the method has learned.
    """

    def __init__(self, method: Method, *, schedule: Schedule, kernel: str = "auto", timing: bool = False) -> None:
        self.method = method
        self.schedule = schedule
        self.kernel = kernel
        self.timing = timing
        self.position = Position(run=-1)
        self._plans: dict[tuple[Sequence, torch.device], Plan | Dense] = {}
        self._rehearsed: WeakKeyDictionary[Plan, set[torch.dtype]] = WeakKeyDictionary()
        self._states: dict[tuple[int, int, str | None], State] = {}
        self._shared: dict[Any, Any] = {}
        self._calls: deque[tuple[dict[str, Any], Stopwatch | None]] = deque(maxlen=RECORDS_KEPT)
        self._forwards: deque[Stopwatch] = deque(maxlen=RECORDS_KEPT)
        self._last_plan: Plan | None = None
        self._last_choice: kernels.Choice | None = None
        self._stays_dense: str | None = None
        self._looked_at: set[tuple[int, int]] = set()
        self._looks: list[sanity.Look] = []
        self._share = 0
        self.trained = Trained()

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """The same settings and parameters at work elsewhere: plans, state and statistics are not shared."""
        twin = Session(self.method, schedule=self.schedule, kernel=self.kernel, timing=self.timing)
        twin.trained = copy.deepcopy(self.trained, memo)
        return twin

    def learns(self, layer: int) -> bool:
        """Whether a layer gets parameters: those that stay dense in any case need none."""
        return self.method.learns and layer not in self.schedule.dense_layers

    def refuse_compiled_training(self, seat: Seat) -> None:
        """Raise ``MethodError`` for a compiled call whose parameters await a gradient, which would never come."""
        if self.trained.awaits_gradient(seat.model, seat.layer):
            raise MethodError(
                f"{self.method.name} has trained parameters, whose gradients torch.compile does not see: train the "
                "model in eager mode, and run a compiled one under torch.no_grad()"
            )

    def begin(
        self, position: Position, device: torch.device, stays_dense: str | None = None, *, share: int = 0
    ) -> None:
        """A root forward starts; the first of a run forgets the run before.

        ``stays_dense``: why all of this forward does, if it does. ``share``: which of the processes that share the
        heads evenly this one is.
        """
        if position.run != self.position.run:
            self._states.clear()
            self._shared.clear()
            self._calls.clear()
            self._forwards.clear()
            self._looked_at.clear()
            self._last_plan = self._last_choice = None
        self._looks.clear()
        self.position = position
        self._stays_dense = stays_dense
        self._share = share
        self.trained.begin(device)
        if self.timing:
            self._forwards.append(Stopwatch(device))

    def replan(self, method: Method) -> None:
        """Plan by other settings of the same method from now on."""
        if type(method) is not type(self.method):
            raise TypeError(f"the session is of {self.method.name}, not of {method.name}")
        if method != self.method:
            self.method = method
            self._plans.clear()

    def forget(self) -> None:
        """Drop what the method has kept for later calls of the run."""
        self._states.clear()

    def end(self) -> None:
        """The root forward is over. Raises ``OutputError`` when a layer put out what attention cannot."""
        if self._forwards:
            self._forwards[-1].stop()
        looks, self._looks = self._looks, []
        sanity.judge(looks)

    def attend(
        self,
        seat: Seat,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        *,
        grid: Grid | None,
        dense: DenseBackend,
        mask: Tensor | None = None,
        scale: float | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, bool]:
        """One self-attention call: the output [B, S, H, D], and whether a plan computed it.

        ``mask``: as for PyTorch's attention. A plan is made only where it is over keys alone, bool [B, 1, 1, S].
        ``hidden``: the layer's input [B, S, C] or that of the grid's tokens alone, for a branch that reads it.
        """
        started = time.perf_counter()
        sequence = self._sequence(seat, grid, q_BSHD, k_BSHD, mask)
        plan: Plan | Dense
        ahead: Plan | None
        if isinstance(sequence, Dense):
            plan, ahead = sequence, None
        else:
            plan = self._decide(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
            ahead = self._plan_ahead(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
        note: dict[str, Any] = {"plan_seconds": time.perf_counter() - started}
        if ahead is not None:
            self._rehearse(ahead, seat, q_BSHD, k_BSHD, v_BSHD, mask, scale)
        watch = Stopwatch(q_BSHD.device) if self.timing else None
        if isinstance(plan, Dense):
            out = dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale)
            note.update(density=1.0, kernel=dense.name(), reason=plan.reason)
        else:
            kept, choice = self._run(plan, q_BSHD, k_BSHD, v_BSHD, mask, scale, dense)
            assert isinstance(sequence, Sequence)  # a plan was made for it
            tensors = (q_BSHD, k_BSHD, v_BSHD, kept)
            out = self._extended(seat, sequence, plan, tensors, mask, scale, hidden)
            note.update(density=plan.density, kernel=choice.name, reason=None)
            self._last_plan, self._last_choice = plan, choice
        self._note(seat, note, watch.stop() if watch else None)
        if not isinstance(plan, Dense) and (seat.model, seat.layer) not in self._looked_at:
            self._looked_at.add((seat.model, seat.layer))
            self._look(seat, choice, q_BSHD, k_BSHD, v_BSHD, kept)
        return out, not isinstance(plan, Dense)

    def attend_again(
        self,
        seat: Seat,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        *,
        grid: Grid | None,
        dense: DenseBackend,
        mask: Tensor | None,
        scale: float | None,
    ) -> Tensor:
        """A call of the past once more, for its gradient: planned on ``grid``, or dense when that is ``None``.

        Raises ``MethodError`` for a method that looks at q and k, because its plan of then is gone.
        """
        if grid is None:
            return dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale)
        if not self.method.static:
            raise MethodError(f"{self.method.name} plans from queries and keys; train it in eager mode, not compiled")
        plan = self._cached_plan(seat, _sequence(seat, grid, q_BSHD.shape[1]), q_BSHD, k_BSHD, v_BSHD)
        assert isinstance(plan, Plan)  # it was one when the call was first run
        return self._run(plan, q_BSHD, k_BSHD, v_BSHD, mask, scale, dense)[0]

    def report(self) -> Report:
        """What the last run did."""
        return Report(
            method=self.method,
            schedule=self.schedule,
            calls=[Record(**note, attention_seconds=watch.seconds() if watch else None) for note, watch in self._calls],
            forward_seconds=sum(watch.seconds() or 0.0 for watch in self._forwards) if self.timing else None,
            plan=self._last_plan,
            choice=str(self._last_choice) if self._last_choice is not None else None,
        )

    def _run(
        self,
        plan: Plan,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        mask: Tensor | None,
        scale: float | None,
        dense: DenseBackend,
    ) -> tuple[Tensor, kernels.Choice]:
        """The output [B, S, H, D] of a plan, and what computed it.

        A plan that leaves nothing out is the model's own attention, unless the user wants a certain kernel.
        """
        if self._leaves_nothing_out(plan):
            choice = kernels.Choice(dense.name(), "the plan leaves nothing out: the model's own attention", ())
            return dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale), choice
        return self._compute(plan, q_BSHD, k_BSHD, v_BSHD, mask, scale)

    def _compute(
        self, plan: Plan, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, mask: Tensor | None, scale: float | None
    ) -> tuple[Tensor, kernels.Choice]:
        """The output [B, S, H, D] of a plan by a kernel, and which one."""
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        valid = valid_keys(mask, len(q))
        out, _, choice = kernels.dispatch(
            plan, q, k, v, scale=scale, key_valid=valid, impl=self.kernel, needs_lse=False
        )
        return out.transpose(1, 2), choice

    def _extended(
        self,
        seat: Seat,
        sequence: Sequence,
        plan: Plan,
        tensors_BSHD: tuple[Tensor, Tensor, Tensor, Tensor],
        mask: Tensor | None,
        scale: float | None,
        hidden: Tensor | None,
    ) -> Tensor:
        """The output with what the layer has learned, [B, S, H, D], from q, k, v and the output without."""
        branch = self.trained.of(seat.model, seat.layer)
        if branch is None:
            return tensors_BSHD[3]
        q, k, v, out = (x.transpose(1, 2) for x in tensors_BSHD)
        work = Work(
            plan=plan,
            q_BHND=q,
            k_BHND=k,
            v_BHND=v,
            out_BHND=out,
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            key_valid_BN=valid_keys(mask, len(q)),
            hidden_BSC=hidden,
            hidden_tokens=_covered(hidden, sequence),
            sequence=sequence,
            first_head=self._share * q.shape[1],
        )
        with torch.autocast(q.device.type, enabled=False):  # its sums are too long for half precision
            extended: Tensor = branch(work)
        return extended.transpose(1, 2)

    def _leaves_nothing_out(self, plan: Plan) -> bool:
        return self.kernel == "auto" and plan.density == 1 and plan.skip is None

    def _sequence(
        self, seat: Seat, grid: Grid | None, q_BSHD: Tensor, k_BSHD: Tensor, mask: Tensor | None
    ) -> Sequence | Dense:
        """The tokens of a call, or why it has none that a method could plan for."""
        if self._stays_dense is not None:
            return Dense(self._stays_dense)
        if grid is None:
            return Dense("grid unknown")
        tokens, keys = q_BSHD.shape[1], k_BSHD.shape[1]
        if keys != tokens:
            return Dense(f"{tokens} queries attend to {keys} keys: no self-attention")
        if (fault := mask_fault(mask)) is not None:
            return Dense(fault)
        text = tokens - grid.tokens
        if text < 0 or (text > 0 and seat.text_side is None):
            return Dense(f"{tokens} tokens do not fit the grid {grid} of {grid.tokens}")
        return _sequence(seat, grid, tokens)

    def _decide(self, seat: Seat, sequence: Sequence, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Plan | Dense:
        where = self.position
        reason = self.schedule.reason(layer=seat.layer, step=where.step, steps=where.steps)
        if reason is not None:
            return Dense(reason)
        if self.method.static:
            return self._cached_plan(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
        return self._plan(seat, sequence, q_BSHD, k_BSHD, v_BSHD)

    def _plan_ahead(
        self, seat: Seat, sequence: Sequence, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor
    ) -> Plan | None:
        """The plan of later steps, in the dense first ones; once for every size, device and type."""
        where = self.position
        if not self.method.static or not self.schedule.sparse_later(
            layer=seat.layer, step=where.step, steps=where.steps
        ):
            return None
        plan = self._cached_plan(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
        if isinstance(plan, Dense) or self._leaves_nothing_out(plan) or q_BSHD.dtype in self._rehearsed.get(plan, ()):
            return None
        return plan

    def _rehearse(
        self,
        plan: Plan,
        seat: Seat,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> None:
        """Run a plan on the first sample of a dense call, so that a fault shows before minutes are spent."""
        q, k, v = (x[:1].detach().requires_grad_(x.requires_grad) for x in (q_BSHD, k_BSHD, v_BSHD))
        try:
            out, choice = self._compute(plan, q, k, v, None if mask is None else mask[:1], scale)
        except Exception as error:  # whatever a kernel raises, the user must learn what was tried
            raise RehearsalError(
                f"falloff tried the sparse attention of later steps before the first one, with {self.method.name} and "
                f"kernel={self.kernel!r} in {self._words(seat, q)}, and it failed: {error}. Choose another "
                "kernel (see falloff doctor) or method, or falloff.disable"
            ) from error
        self._rehearsed.setdefault(plan, set()).add(q.dtype)
        self._look(seat, choice, q, k, v, out)

    def _look(
        self, seat: Seat, choice: kernels.Choice, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, out: Tensor
    ) -> None:
        """Remember to judge this call when the forward is over. In training the loss tells, so nobody waits for it."""
        if not differentiable(q_BSHD, k_BSHD, v_BSHD):
            self._looks.append(sanity.look(self._words(seat, q_BSHD), choice.name, q_BSHD, k_BSHD, v_BSHD, out))

    def _words(self, seat: Seat, q_BSHD: Tensor) -> str:
        where = self.position
        return (
            f"layer {seat.layer}, step {where.step}, branch {where.branch}, {q_BSHD.shape[1]} tokens in {q_BSHD.dtype}"
        )

    def _cached_plan(
        self, seat: Seat, sequence: Sequence, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor
    ) -> Plan | Dense:
        """One plan object for every layer, step and branch of a static method."""
        key = (sequence, q_BSHD.device)
        if key not in self._plans:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._plan(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
        return self._plans[key]

    def _plan(self, seat: Seat, sequence: Sequence, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Plan | Dense:
        where = self.position
        call = Call(
            sequence=sequence,
            layer=seat.layer,
            layers=seat.layers,
            step=where.step,
            steps=where.steps,
            branch=where.branch,
            first_head=self._share * q_BSHD.shape[2],
        )
        fresh = State(shared=self._shared, trained=self.trained.of(seat.model, seat.layer))
        state = self._states.setdefault((seat.model, seat.layer, where.branch), fresh)
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        try:
            plan = self.method.plan(call, q, k, v, state)
        except Exception as error:  # whatever a method raises, the user must learn at which call
            _fail(self.method, call, error)
        return plan if isinstance(plan, Dense) else plan.to(q_BSHD.device)

    def _note(self, seat: Seat, note: dict[str, Any], watch: Stopwatch | None) -> None:
        where = self.position
        note.update(run=where.run, step=where.step, branch=where.branch, model=seat.model, layer=seat.layer)
        self._calls.append((note, watch))


def _sequence(seat: Seat, grid: Grid, tokens: int) -> Sequence:
    return Sequence(grid, tokens - grid.tokens, seat.text_side or "after")


def _covered(hidden: Tensor | None, sequence: Sequence) -> slice | None:
    """The tokens of a sequence that hidden states [B, S, C] are of: all, or those of the grid."""
    if hidden is None or hidden.shape[1] == sequence.tokens:
        return None
    return slice(sequence.video_start, sequence.video_start + sequence.grid.tokens)


def _fail(method: Method, call: Call, error: Exception) -> NoReturn:
    raise MethodError(
        f"{method.name} failed to plan layer {call.layer}, step {call.step}, branch {call.branch}, "
        f"{call.sequence.tokens} tokens on a grid of {call.sequence.grid}: {error}"
    ) from error
