"""One method at work in the models of one pipeline: its plans, its state, and what every call did.

A host says where a run stands (``begin``) and hands over every self-attention call (``attend``); the session asks
the method for a plan, runs it, or leaves the call to the model's own dense attention, and notes what it did.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor

from falloff import kernels, sanity
from falloff.geometry import Grid, Sequence
from falloff.kernels.masks import mask_fault, valid_keys
from falloff.kernels.needs import differentiable
from falloff.methods.base import Call, Dense, Method, State
from falloff.plan import Plan
from falloff.plans import Kept, PlanCache
from falloff.reporting import Journal, Report, Stopwatch
from falloff.schedule import Schedule
from falloff.trained import Trained, extended


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


class Decision(NamedTuple):
    """What becomes of a call: a plan for its sequence, or the model's own attention for a reason."""

    reason: str | None
    sequence: Sequence | None = None
    plan: Plan | None = None
    whole: bool = False
    """Whether the plan leaves nothing out, so that the model's own attention computes it."""
    lasts: bool = True
    """Whether it holds for all calls of the forward that look the same."""


class Session:
    """A method with its schedule and kernel, at work in one or more models.

    ``kernel``: "auto", or the name of the one kernel to use. ``timing``: measure attention and forwards.
    Statistics and the method's state are of the last run only. ``trained``: what the method has learned.
    """

    def __init__(self, method: Method, *, schedule: Schedule, kernel: str = "auto", timing: bool = False) -> None:
        self.method = method
        self.schedule = schedule.named(None)
        self._dense_layers = self.schedule.dense_of(None)
        self.kernel = kernel
        self.timing = timing
        self.position = Position(run=-1)
        self._plans = PlanCache()
        self._states: dict[tuple[int, int, str | None], State] = {}
        self._shared: dict[Any, Any] = {}
        self._journal = Journal()
        self._last_plan: Plan | None = None
        self._last_choice: kernels.Choice | None = None
        self._stays_dense: str | None = None
        self._latest: tuple[tuple[Any, ...], Decision] | None = None
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
        return self.method.learns and layer not in self._dense_layers

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
            self._journal.clear()
            self._looked_at.clear()
            self._last_plan = self._last_choice = None
        self._looks.clear()
        self._latest = None
        self.position = position
        self._stays_dense = stays_dense
        self._share = share
        self.trained.begin(device)
        if self.timing:
            self._journal.forwards.append(Stopwatch(device))

    def replan(self, method: Method) -> None:
        """Plan by other settings of the same method from now on."""
        if type(method) is not type(self.method):
            raise TypeError(f"the session is of {self.method.name}, not of {method.name}")
        if method != self.method:
            self.method = method
            self._plans.clear()
            self._latest = None

    def forget(self) -> None:
        """Drop what the method has kept for later calls of the run."""
        self._states.clear()

    def end(self) -> None:
        """The root forward is over. Raises ``OutputError`` when a layer put out what attention cannot."""
        if self._journal.forwards:
            self._journal.forwards[-1].stop()
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
        does, planned = self._decision(seat, q_BSHD, k_BSHD, v_BSHD, grid, mask, scale)
        plan, where = does.plan, self.position
        watch = Stopwatch(q_BSHD.device) if self.timing else None
        if plan is None or does.whole:
            out = kept = dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale)
            kernel, density, choice = dense.name(), 1.0, None
        else:
            kept, choice = self._compute(plan, q_BSHD, k_BSHD, v_BSHD, mask, scale)
            out, kernel, density = kept, choice.name, plan.density
        if plan is not None:
            branch = self.trained.of(seat.model, seat.layer)
            if branch is not None:
                assert does.sequence is not None  # the plan's
                first_head, tensors = self._share * q_BSHD.shape[2], (q_BSHD, k_BSHD, v_BSHD, kept)
                out = extended(branch, plan, does.sequence, tensors, mask, scale, hidden, first_head)
        if watch is not None:
            watch.stop()
        self._journal.calls.append(
            (where.run, where.step, seat.model, seat.layer, where.branch, density, kernel, does.reason, planned, watch)
        )
        if plan is None:
            return out, False
        self._last_plan, self._last_choice = plan, choice or _models_own(kernel)
        if (seat.model, seat.layer) not in self._looked_at:
            self._looked_at.add((seat.model, seat.layer))
            self._look(seat, kernel, q_BSHD, k_BSHD, v_BSHD, kept)
        return out, True

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
        plan = self._kept(seat, _sequence(seat, grid, q_BSHD.shape[1]), q_BSHD, k_BSHD, v_BSHD).plan
        assert isinstance(plan, Plan)  # it was one when the call was first run
        if self._leaves_nothing_out(plan):
            return dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale)
        return self._compute(plan, q_BSHD, k_BSHD, v_BSHD, mask, scale)[0]

    def report(self) -> Report:
        """What the last run did."""
        return Report(
            method=self.method,
            schedule=self.schedule,
            calls=self._journal.records(),
            forward_seconds=self._journal.forward_seconds() if self.timing else None,
            plan=self._last_plan,
            choice=str(self._last_choice) if self._last_choice is not None else None,
        )

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

    def _leaves_nothing_out(self, plan: Plan) -> bool:
        """Such a plan is the model's own attention, unless the user wants a certain kernel."""
        return self.kernel == "auto" and plan.density == 1 and plan.skip is None

    def _decision(
        self,
        seat: Seat,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        grid: Grid | None,
        mask: Tensor | None,
        scale: float | None,
    ) -> tuple[Decision, float]:
        """What becomes of a call, and the seconds it took to plan it.

        Layers are alike: nearly always it is what became of the last one's call, and no more than that is looked at.
        """
        alike = (
            grid,
            q_BSHD.shape,
            k_BSHD.shape,
            q_BSHD.dtype,
            q_BSHD.device,
            None if mask is None else (mask.shape, mask.dtype),
            seat.text_side,
            seat.layer in self._dense_layers,
        )
        if self._latest is not None and self._latest[0] == alike:
            return self._latest[1], 0.0
        started = time.perf_counter()
        does = self._decide(seat, q_BSHD, k_BSHD, v_BSHD, grid, mask)
        ahead = self._plan_ahead(seat, does.sequence, q_BSHD, k_BSHD, v_BSHD)
        planned = time.perf_counter() - started
        if ahead is not None:
            self._rehearse(ahead, seat, q_BSHD, k_BSHD, v_BSHD, mask, scale)
        self._latest = (alike, does) if does.lasts else None
        return does, planned

    def _decide(
        self, seat: Seat, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, grid: Grid | None, mask: Tensor | None
    ) -> Decision:
        if self._stays_dense is not None:
            return Decision(self._stays_dense)
        if grid is None:
            return Decision("grid unknown")
        tokens, keys = q_BSHD.shape[1], k_BSHD.shape[1]
        if keys != tokens:
            return Decision(f"{tokens} queries attend to {keys} keys: no self-attention")
        if (fault := mask_fault(mask)) is not None:
            return Decision(fault)
        text = tokens - grid.tokens
        if text < 0 or (text > 0 and seat.text_side is None):
            return Decision(f"{tokens} tokens do not fit the grid {grid} of {grid.tokens}")
        where, sequence = self.position, _sequence(seat, grid, tokens)
        reason = self.schedule.reason(layer=seat.layer, step=where.step, steps=where.steps)
        if reason is not None:
            return Decision(reason, sequence)
        static = self.method.static
        plan = (
            self._kept(seat, sequence, q_BSHD, k_BSHD, v_BSHD).plan
            if static
            else self._plan(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
        )
        if isinstance(plan, Dense):
            return Decision(plan.reason, sequence, lasts=static)
        return Decision(None, sequence, plan, self._leaves_nothing_out(plan), lasts=static)

    def _plan_ahead(
        self, seat: Seat, sequence: Sequence | None, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor
    ) -> Kept | None:
        """The plan of later steps, in the dense first ones; once for every size, device and type."""
        where = self.position
        if sequence is None or not self.method.static:
            return None
        if not self.schedule.sparse_later(layer=seat.layer, step=where.step, steps=where.steps):
            return None
        kept = self._kept(seat, sequence, q_BSHD, k_BSHD, v_BSHD)
        plan = kept.plan
        if isinstance(plan, Dense) or self._leaves_nothing_out(plan) or q_BSHD.dtype in kept.tried:
            return None
        return kept

    def _rehearse(
        self,
        kept: Kept,
        seat: Seat,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        mask: Tensor | None,
        scale: float | None,
    ) -> None:
        """Run a plan on the first sample of a dense call, so that a fault shows before minutes are spent."""
        assert isinstance(kept.plan, Plan)  # one to be tried
        q, k, v = (x[:1].detach().requires_grad_(x.requires_grad) for x in (q_BSHD, k_BSHD, v_BSHD))
        try:
            out, choice = self._compute(kept.plan, q, k, v, None if mask is None else mask[:1], scale)
        except Exception as error:  # whatever a kernel raises, the user must learn what was tried
            raise RehearsalError(
                f"falloff tried the sparse attention of later steps before the first one, with {self.method.name} and "
                f"kernel={self.kernel!r} in {self._words(seat, q)}, and it failed: {error}. Choose another "
                "kernel (see falloff doctor) or method, or falloff.disable"
            ) from error
        kept.tried.add(q.dtype)
        self._look(seat, choice.name, q, k, v, out)

    def _look(self, seat: Seat, kernel: str, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, out: Tensor) -> None:
        """Remember to judge this call when the forward is over. In training the loss tells, so nobody waits for it."""
        if not differentiable(q_BSHD, k_BSHD, v_BSHD):
            self._looks.append(sanity.look(self._words(seat, q_BSHD), kernel, q_BSHD, k_BSHD, v_BSHD, out))

    def _words(self, seat: Seat, q_BSHD: Tensor) -> str:
        where = self.position
        return (
            f"layer {seat.layer}, step {where.step}, branch {where.branch}, {q_BSHD.shape[1]} tokens in {q_BSHD.dtype}"
        )

    def _kept(self, seat: Seat, sequence: Sequence, q_BSHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor) -> Kept:
        """One plan object for every layer, step and branch of a static method."""
        return self._plans.get(sequence, q_BSHD.device, lambda: self._plan(seat, sequence, q_BSHD, k_BSHD, v_BSHD))

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


def _sequence(seat: Seat, grid: Grid, tokens: int) -> Sequence:
    return Sequence(grid, tokens - grid.tokens, seat.text_side or "after")


@lru_cache(maxsize=64)
def _models_own(name: str) -> kernels.Choice:
    return kernels.Choice(name, "the plan leaves nothing out: the model's own attention", ())


def _fail(method: Method, call: Call, error: Exception) -> NoReturn:
    raise MethodError(
        f"{method.name} failed to plan layer {call.layer}, step {call.step}, branch {call.branch}, "
        f"{call.sequence.tokens} tokens on a grid of {call.sequence.grid}: {error}"
    ) from error
