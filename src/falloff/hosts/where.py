"""Where a run stands: which run, step and branch of guidance a root forward belongs to.

In order of trust: what the pipeline says through ``cache_context``; its scheduler's step index; and, without
either, the order of the forwards. Forwards that share a timestep are the passes of one step.
"""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from falloff.session import Position

MAX_PASSES = 4
"""Most passes a step of guidance has; forwards beyond them that repeat one timestep are a new run."""


class Watch:
    """Follows the root forwards of one pipeline, or of transformers without one.

    A pipeline is asked only while it runs, so that a forward by hand is not taken for one of its steps.
    """

    def __init__(self, pipe: Any | None, branches: tuple[str, ...]) -> None:
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self._branches = branches
        self._ended = True
        self._run = -1
        self._step = 0
        self._pass = 0
        self._mark: Tensor | float | None = None
        self._first_index: int | None = None
        self.told: Position | None = None
        """Where the next forwards stand, each in a run of its own, whatever its number here; training says so."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Watch:
        """A copy follows the copied pipeline, or none when only a transformer was copied."""
        pipe = self._pipe() if self._pipe is not None else None
        return Watch(memo.get(id(pipe)), self._branches)

    def end_run(self) -> None:
        """The next forward starts a run."""
        self._ended = True

    def look(self, context: Any | None, timestep: Tensor | float) -> Position:
        """Where the forward that is about to start stands.

        ``context``: what the pipeline said through ``cache_context`` (``name``, ``step_index``,
        ``num_inference_steps``), or ``None``. ``timestep``, a number, [B] or [B, S], is read only without a running
        pipeline, or with one that does not say where it is, because that waits for the device.
        """
        if self.told is not None:
            self.end_run()
            self._run += 1
            return replace(self.told, run=self._run)
        pipe = self._pipe() if self._pipe is not None else None
        mark = getattr(pipe, "_current_timestep", None)
        if pipe is None or mark is None:
            mute = pipe is not None and not hasattr(pipe, "_current_timestep")  # it never says whether it runs
            steps = getattr(pipe, "_num_timesteps", None) if mute else None
            return self._by_value(context, float(torch.as_tensor(timestep).max()), steps)
        index = getattr(context, "step_index", None)
        if index is None:
            index = self._scheduler_step(pipe.scheduler)
        same_step = isinstance(self._mark, Tensor) and mark is self._mark
        back = index is not None and index <= self._step and not same_step
        self._advance(mark, start=back or not isinstance(self._mark, Tensor), same_step=same_step)
        if index is not None:
            self._step = index
        steps = getattr(context, "num_inference_steps", None)
        return self._position(context, steps if steps is not None else getattr(pipe, "_num_timesteps", None))

    def _by_value(self, context: Any | None, mark: float, steps: int | None) -> Position:
        """Timesteps fall during a run, whatever their unit."""
        before = self._mark if isinstance(self._mark, float) else math.inf
        start = mark > before or before == math.inf or (mark == before and self._pass + 1 == MAX_PASSES)
        self._advance(mark, start=start, same_step=mark == before)
        return self._position(context, steps)

    def _advance(self, mark: Tensor | float, *, start: bool, same_step: bool) -> None:
        if self._ended or start:
            self._ended = False
            self._run += 1
            self._step = self._pass = 0
        elif same_step:
            self._pass += 1
        else:
            self._step += 1
            self._pass = 0
        self._mark = mark

    def _scheduler_step(self, scheduler: Any) -> int | None:
        """Steps since the run began, or ``None`` when the scheduler does not count.

        Before its first step a scheduler has no index. Video to video begins in the middle of the timesteps and
        need not say where, but then the first index seen comes after exactly one step.
        """
        if not hasattr(scheduler, "step_index"):
            return None
        if scheduler.step_index is None:
            self._first_index = None
            return 0
        if self._first_index is None:
            begin = getattr(scheduler, "begin_index", None)
            self._first_index = begin if begin is not None else scheduler.step_index - 1
        return int(scheduler.step_index) - self._first_index

    def _position(self, context: Any | None, steps: int | None) -> Position:
        branch = getattr(context, "name", None)
        if branch is None:
            known = self._pass < len(self._branches)
            branch = self._branches[self._pass] if known else f"pass {self._pass + 1}"
        return Position(run=self._run, step=self._step, steps=steps, branch=branch)
