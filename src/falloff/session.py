"""One method at work in the models of one pipeline: its plans, its state, and what every call did.

A host says where a run stands (``begin``) and hands over every self-attention call (``attend``); the session asks
the method for a plan, runs it, or leaves the call to the model's own dense attention, and notes what it did.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from falloff import kernels
from falloff.geometry import Grid, Sequence
from falloff.kernels.masks import mask_fault, valid_keys
from falloff.methods.base import Call, Dense, Method, State
from falloff.plan import Plan
from falloff.schedule import Schedule

PLANS_KEPT = 8
"""Plans of a static method kept at once: one for every size in use."""
RECORDS_KEPT = 100_000
"""Bound on the memory of a run that never ends, as training without a pipeline is one."""


class MethodError(RuntimeError):
    """A method failed to plan a call; says which, and its cause says why."""


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


class Stopwatch:
    """Seconds between start and stop on a device, read later so that nothing waits for the device meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._start = self._mark()
        self._stop: float | torch.cuda.Event | None = None

    def stop(self) -> Stopwatch:
        self._stop = self._mark()
        return self

    def seconds(self) -> float | None:
        """``None`` while it runs. On a GPU this waits for the work that was timed."""
        if self._stop is None:
            return None
        if isinstance(self._start, float) or isinstance(self._stop, float):
            return float(self._stop) - float(self._start)  # type: ignore[arg-type]
        self._stop.synchronize()
        return float(self._start.elapsed_time(self._stop)) / 1000

    def _mark(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event


@dataclass(frozen=True, kw_only=True)
class Record:
    """What one self-attention call did. ``reason``: why it stayed dense, ``None`` when a plan computed it.

    Seconds of attention are ``None`` unless timed; those of planning are the host's.
    """

    run: int
    step: int | None
    model: int
    layer: int
    branch: str | None
    density: float
    kernel: str
    reason: str | None
    plan_seconds: float
    attention_seconds: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Report:
    """What a method did in the last run. ``str()`` is for reading, ``to_dict()`` for JSON."""

    method: Method
    schedule: Schedule
    calls: list[Record]
    forward_seconds: float | None
    """Of all root forwards; ``None`` unless timed."""
    plan: Plan | None
    """The last plan that was run."""
    choice: str | None
    """The kernel that ran it, why, and why not another."""

    @property
    def density(self) -> float:
        """Mean over the calls that a plan computed; 1 without any."""
        return _mean([call.density for call in self.calls if call.reason is None])

    @property
    def effective_density(self) -> float:
        """Mean over all calls, dense ones as 1; 1 without any."""
        return _mean([call.density for call in self.calls])

    @property
    def kernels(self) -> dict[str, int]:
        """Calls by kernel; dense calls by the model's own backend."""
        return dict(Counter(call.kernel for call in self.calls))

    @property
    def reasons(self) -> dict[str, int]:
        """Dense calls by reason."""
        return dict(Counter(call.reason for call in self.calls if call.reason is not None))

    @property
    def plan_seconds(self) -> float:
        return sum(call.plan_seconds for call in self.calls)

    @property
    def attention_seconds(self) -> float | None:
        """Of all self-attention calls, planning left out; ``None`` unless timed."""
        seconds = [call.attention_seconds for call in self.calls if call.attention_seconds is not None]
        return sum(seconds) if seconds else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of the plan its pairs alone."""
        return {
            "method": self.method.name,
            "settings": self.method.settings(),
            "schedule": asdict(self.schedule),
            "density": self.density,
            "effective_density": self.effective_density,
            "kernels": self.kernels,
            "reasons": self.reasons,
            "plan_seconds": self.plan_seconds,
            "attention_seconds": self.attention_seconds,
            "forward_seconds": self.forward_seconds,
            "choice": self.choice,
            "calls": [asdict(call) for call in self.calls],
        }

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{value}" for name, value in self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        lines = [("method", f"{self.method.name} {_settings(self.method.settings())}".rstrip())]
        lines.append(("schedule", _settings(asdict(self.schedule))))
        if not self.calls:
            return [*lines, ("calls", "none yet")]
        dense = sum(self.reasons.values())
        lines.append(("calls", f"{len(self.calls) - dense} sparse, {dense} dense"))
        lines.append(("density", f"{self.density:.1%} of the pairs in sparse calls"))
        lines.append(("effective density", f"{self.effective_density:.1%} with dense calls as 100%"))
        lines.append(("kernels", _settings(self.kernels)))
        lines += [("dense because", f"{reason}: {count} calls") for reason, count in self.reasons.items()]
        lines.append(("planning", f"{self.plan_seconds:.3f} s"))
        if self.attention_seconds is not None:
            lines.append(("attention", f"{self.attention_seconds:.3f} s"))
        if self.forward_seconds is not None:
            lines.append(("forwards", f"{self.forward_seconds:.3f} s"))
        if self.choice is not None:
            lines.append(("kernel", self.choice.replace("\n", "\n" + " " * 18)))
        return lines


class Session:
    """A method with its schedule and kernel, at work in one or more models.

    ``kernel``: "auto", or the name of the one kernel to use. ``timing``: measure attention and forwards.
    Statistics and the method's state are of the last run only.
    """

    def __init__(self, method: Method, *, schedule: Schedule, kernel: str = "auto", timing: bool = False) -> None:
        self.method = method
        self.schedule = schedule
        self.kernel = kernel
        self.timing = timing
        self.position = Position(run=-1)
        self._plans: dict[tuple[Sequence, torch.device], Plan | Dense] = {}
        self._states: dict[tuple[int, int, str | None], State] = {}
        self._shared: dict[Any, Any] = {}
        self._calls: deque[tuple[dict[str, Any], Stopwatch | None]] = deque(maxlen=RECORDS_KEPT)
        self._forwards: deque[Stopwatch] = deque(maxlen=RECORDS_KEPT)
        self._last_plan: Plan | None = None
        self._last_choice: kernels.Choice | None = None
        self._stays_dense: str | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        """The same settings at work elsewhere: plans, state and statistics are not shared."""
        return Session(self.method, schedule=self.schedule, kernel=self.kernel, timing=self.timing)

    def begin(self, position: Position, device: torch.device, stays_dense: str | None = None) -> None:
        """A root forward starts; the first of a run forgets the run before.

        ``stays_dense``: why all of this forward does, if it does.
        """
        if position.run != self.position.run:
            self._states.clear()
            self._shared.clear()
            self._calls.clear()
            self._forwards.clear()
            self._last_plan = self._last_choice = None
        self.position = position
        self._stays_dense = stays_dense
        if self.timing:
            self._forwards.append(Stopwatch(device))

    def end(self) -> None:
        """The root forward is over."""
        if self._forwards:
            self._forwards[-1].stop()

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
    ) -> tuple[Tensor, bool]:
        """One self-attention call: the output [B, S, H, D], and whether a plan computed it.

        ``mask``: as for PyTorch's attention. A plan is made only where it is over keys alone, bool [B, 1, 1, S].
        """
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        started = time.perf_counter()
        plan = self._decide(seat, grid, q, k, v, mask)
        note: dict[str, Any] = {"plan_seconds": time.perf_counter() - started}
        watch = Stopwatch(q.device) if self.timing else None
        if isinstance(plan, Dense):
            out = dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale)
            note.update(density=1.0, kernel=dense.name(), reason=plan.reason)
        else:
            out, choice = self._run(plan, q_BSHD, k_BSHD, v_BSHD, mask, scale, dense)
            note.update(density=plan.density, kernel=choice.name, reason=None)
            self._last_plan, self._last_choice = plan, choice
        self._note(seat, note, watch.stop() if watch else None)
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
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        plan = self._cached_plan(seat, _sequence(seat, grid, q.shape[2]), q, k, v)
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
        if self.kernel == "auto" and plan.density == 1:
            choice = kernels.Choice(dense.name(), "the plan leaves nothing out: the model's own attention", ())
            return dense.run(q_BSHD, k_BSHD, v_BSHD, mask, scale), choice
        q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BSHD, v_BSHD))
        valid = valid_keys(mask, len(q))
        out, _, choice = kernels.dispatch(
            plan, q, k, v, scale=scale, key_valid=valid, impl=self.kernel, needs_lse=False
        )
        return out.transpose(1, 2), choice

    def _decide(
        self, seat: Seat, grid: Grid | None, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Plan | Dense:
        if self._stays_dense is not None:
            return Dense(self._stays_dense)
        if grid is None:
            return Dense("grid unknown")
        if k.shape[2] != q.shape[2]:
            return Dense(f"{q.shape[2]} queries attend to {k.shape[2]} keys: no self-attention")
        if (fault := mask_fault(mask)) is not None:
            return Dense(fault)
        text = q.shape[2] - grid.tokens
        if text < 0 or (text > 0 and seat.text_side is None):
            return Dense(f"{q.shape[2]} tokens do not fit the grid {grid} of {grid.tokens}")
        where = self.position
        reason = self.schedule.reason(layer=seat.layer, step=where.step, steps=where.steps)
        if reason is not None:
            return Dense(reason)
        sequence = _sequence(seat, grid, q.shape[2])
        if self.method.static:
            return self._cached_plan(seat, sequence, q, k, v)
        return self._plan(seat, sequence, q, k, v)

    def _cached_plan(self, seat: Seat, sequence: Sequence, q: Tensor, k: Tensor, v: Tensor) -> Plan | Dense:
        """One plan object for every layer, step and branch of a static method."""
        key = (sequence, q.device)
        if key not in self._plans:
            if len(self._plans) >= PLANS_KEPT:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self._plan(seat, sequence, q, k, v)
        return self._plans[key]

    def _plan(self, seat: Seat, sequence: Sequence, q: Tensor, k: Tensor, v: Tensor) -> Plan | Dense:
        where = self.position
        call = Call(
            sequence=sequence,
            layer=seat.layer,
            layers=seat.layers,
            step=where.step,
            steps=where.steps,
            branch=where.branch,
        )
        state = self._states.setdefault((seat.model, seat.layer, where.branch), State(shared=self._shared))
        try:
            plan = self.method.plan(call, q, k, v, state)
        except Exception as error:  # whatever a method raises, the user must learn at which call
            _fail(self.method, call, error)
        return plan if isinstance(plan, Dense) else plan.to(q.device)

    def _note(self, seat: Seat, note: dict[str, Any], watch: Stopwatch | None) -> None:
        where = self.position
        note.update(run=where.run, step=where.step, branch=where.branch, model=seat.model, layer=seat.layer)
        self._calls.append((note, watch))


def _sequence(seat: Seat, grid: Grid, tokens: int) -> Sequence:
    return Sequence(grid, tokens - grid.tokens, seat.text_side or "after")


def _fail(method: Method, call: Call, error: Exception) -> NoReturn:
    raise MethodError(
        f"{method.name} failed to plan layer {call.layer}, step {call.step}, branch {call.branch}, "
        f"{call.sequence.tokens} tokens on a grid of {call.sequence.grid}: {error}"
    ) from error


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _mean(densities: list[float]) -> float:
    return sum(densities) / len(densities) if densities else 1.0
