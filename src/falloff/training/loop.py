"""One loop for every training: resumable to the very step, on one process or many.

All chance comes from the seed and the number of the sample, so nothing but parameters, their average, the optimizer
and the step has to be kept. Killed at any moment, a training goes on from its last state and its log reads as if
nothing had been: what was logged after that state is dropped and logged again.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from falloff.evaluation import files
from falloff.training.errors import TrainingError

STATE, LOG = "state.pt", "log.jsonl"
HASH = re.compile("[0-9a-f]{32}")
"""How an identity tells the content of files."""
Loss = Callable[[int, torch.Generator], Tensor]
"""Loss of sample number n, with the chance of that sample: 0-d, to be differentiated."""
Item = TypeVar("Item")
Share = Callable[[Sequence[int]], Iterable[tuple[int, bool]]]
"""Of the numbers of a step's samples, those that this process takes; and whether a sample counts, or is taken by this
process only because all have to run the model together."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How long and how fast to train.

    steps: of the optimizer. batch: samples a step, over all processes, each a forward of its own. rate: AdamW's, after
    ``warmup`` steps of linear rise. clip: gradient norm. ema: decay of the average of the weights, which then is what
    is validated and kept, or None for no average. save_every, check_every: steps between states, and between
    validations.
    """

    steps: int = 2000
    batch: int = 1
    rate: float = 1e-4
    warmup: int = 10
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float | None = None
    seed: int = 0
    save_every: int = 100
    check_every: int = 250

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "save_every", "check_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 1")
        for name in ("rate", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be above 0")
        for name in ("warmup", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} = {getattr(self, name)} must be at least 0")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"ema = {self.ema} must be between 0 and 1, or left out for no average")

    def rate_at(self, step: int) -> float:
        return self.rate * min(1.0, (step + 1) / (self.warmup + 1))


@dataclass(frozen=True)
class Now:
    """Where a training stands: steps done, and the last loss."""

    step: int
    loss: float


def train(
    parameters: Mapping[str, nn.Parameter],
    loss: Loss,
    course: Course,
    folder: Path,
    accelerator: Accelerator,
    *,
    identity: Mapping[str, Any],
    check: Callable[[int], Mapping[str, float]] = lambda step: {},
    on_step: Callable[[Now], None] = lambda now: None,
    half: bool = False,
    share: Share | None = None,
    team: int = 1,
) -> None:
    """Train ``parameters`` in place, going on from ``folder`` where a state is; at the end they hold the average.

    identity: plain values that must be the same when a training goes on; the number of steps may grow. check: called
    before the first step, every ``check_every`` steps and at the end, with the parameters as they are to be judged;
    returns figures to log. half: compute in bfloat16 by autocast. share: ``evenly`` unless given. team: processes that
    take each sample together, each with a part of its gradient.

    Raises ``TrainingError`` for a state of other settings, and ``ArithmeticError`` for a loss that is not finite.
    """
    takers = accelerator.num_processes // team
    if course.batch % takers:
        what = "processes" if team == 1 else f"teams of {team} processes"
        raise TrainingError(f"batch = {course.batch} does not share evenly between {takers} {what}")
    run = _Run(parameters, course, folder, accelerator, identity, half, share, team)
    step = run.load()
    if step == 0:
        run.log({"step": 0, **run.judged(check, 0)})
    for number in range(step, course.steps):
        began = time.perf_counter()
        mean, norm = run.step(number, loss)
        done = number + 1
        seconds = round(time.perf_counter() - began, 3)
        run.log({"step": done, "loss": mean, "norm": norm, "rate": course.rate_at(number), "seconds": seconds})
        if done % course.check_every == 0 or done == course.steps:
            run.log({"step": done, **run.judged(check, done)})
        if done % course.save_every == 0 or done == course.steps:
            run.save(done)
        on_step(Now(done, mean))
    run.use_average()


def generator_for(seed: int, *numbers: int) -> torch.Generator:
    """A stream of chance for these numbers, which no other numbers share."""
    state = np.random.SeedSequence([seed, *numbers]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) >> 1)


def chance(seed: int, sample: int) -> torch.Generator:
    """The chance of a sample."""
    return generator_for(seed, 1, sample)


def evenly(accelerator: Accelerator, items: Sequence[Item], team: int = 1) -> list[tuple[Item, bool]]:
    """Of some work every so manieth item for this process, or its team; each counts, see ``Share``."""
    return [(item, True) for item in items[accelerator.process_index // team :: accelerator.num_processes // team]]


def drawn(number: int, count: int, seed: int) -> int:
    """Which of ``count`` clips sample ``number`` is: all in a new order in every round."""
    order = torch.randperm(count, generator=generator_for(seed, 0, number // count))
    return int(order[number % count])


class _Run:
    """The parts of a training that are kept on disk."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        course: Course,
        folder: Path,
        accelerator: Accelerator,
        identity: Mapping[str, Any],
        half: bool,
        share: Share | None,
        team: int,
    ) -> None:
        self.half, self.team = half, team
        self.share = share or partial(evenly, accelerator, team=team)
        self.parameters, self.course, self.folder, self.accelerator = parameters, course, folder, accelerator
        settings = {name: value for name, value in asdict(course).items() if name != "steps"}
        self.identity = {**settings, **identity, "processes": accelerator.num_processes}
        self.optimizer = torch.optim.AdamW(list(parameters.values()), course.rate, weight_decay=course.weight_decay)
        self.average = {name: p.detach().clone() for name, p in parameters.items()} if course.ema else None

    def step(self, number: int, loss: Loss) -> tuple[float, float]:
        """One step of the optimizer; the mean loss over all processes and the norm of the gradient before clipping."""
        batch = self.course.batch
        total = torch.zeros((), device=self.accelerator.device)
        for sample, counts in self.share(range(number * batch, (number + 1) * batch)):
            with self._autocast():
                value = loss(sample, chance(self.course.seed, sample))
            part = value / batch if counts else value * 0
            torch.autograd.backward(part)
            total += part.detach()
        mean = float(self.accelerator.reduce(total, "sum")) / self.team
        if not math.isfinite(mean):
            raise ArithmeticError(f"the loss of step {number + 1} is {mean}; lower the rate, or train in float32")
        self._share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.course.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.course.rate_at(number)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._update_average()
        return mean, float(norm)

    def judged(self, check: Callable[[int], Mapping[str, float]], step: int) -> Mapping[str, float]:
        with self._averaged(), torch.no_grad(), self._autocast():
            return check(step)

    def use_average(self) -> None:
        if self.average is not None:
            _copy(self.average, self.parameters)

    def log(self, entry: Mapping[str, Any]) -> None:
        if self.accelerator.is_main_process and len(entry) > 1:
            with (self.folder / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
            figures = {name: value for name, value in entry.items() if name != "step"}
            self.accelerator.log(figures, step=entry["step"])

    def save(self, step: int) -> None:
        """Beside first, then renamed."""
        self.accelerator.wait_for_everyone()
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": step,
            "identity": json.dumps(self.identity, sort_keys=True),
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "average": self.average,
        }
        beside = self.folder / f"{STATE}.part"
        torch.save(state, beside)
        os.replace(beside, self.folder / STATE)

    def load(self) -> int:
        """The number of steps done; fills the parts, and cuts the log to those steps."""
        file = self.folder / STATE
        if not file.exists():
            self._cut_log(-1)
            return 0
        state = torch.load(file, map_location="cpu", weights_only=True)
        self._check(json.loads(state["identity"]))
        _copy(state["parameters"], self.parameters)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            _copy(state["average"], self.average)
        step: int = state["step"]
        self._cut_log(step)
        return step

    def _autocast(self) -> torch.autocast:
        # not Accelerate's, which allows one precision a process
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self.half)

    def _check(self, before: dict[str, Any]) -> None:
        now = json.loads(json.dumps(self.identity))
        if changed := [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]:
            told = ", ".join(_change(name, before.get(name), now.get(name)) for name in changed)
            raise TrainingError(
                f"{self.folder} holds a training of other settings: {told}; go on with those, or give another folder"
            )

    def _cut_log(self, step: int) -> None:
        file = self.folder / LOG
        if not self.accelerator.is_main_process or not file.exists():
            return
        kept = []
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that was being written
                break
            if entry["step"] <= step:
                kept.append(line + "\n")
        files.write(file, "".join(kept))

    def _share_gradients(self) -> None:
        """Every process adds up the gradients of all: one reduction for all parameters.

        What no process has a gradient of keeps none, so that a step leaves it as it is: of two transformers the one
        at whose noise levels there was no sample is trained as if it were alone.
        """
        if self.accelerator.num_processes == 1:
            return
        parameters = list(self.parameters.values())
        asked = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = self.accelerator.reduce(torch.cat([asked, *(g.flatten() for g in gradients)]), "sum")
        counts, *parts = flat.split([len(parameters), *(g.numel() for g in gradients)])
        for parameter, count, part in zip(parameters, counts.tolist(), parts, strict=True):
            parameter.grad = part.view_as(parameter) if count else None

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average is not None and self.course.ema is not None:
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - self.course.ema)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """With the average in the parameters' place."""
        if self.average is None:
            yield
            return
        current = {name: p.detach().clone() for name, p in self.parameters.items()}
        _copy(self.average, self.parameters)
        try:
            yield
        finally:
            _copy(current, self.parameters)


def _change(name: str, before: Any, now: Any) -> str:
    """In words; of what is known by its hash alone, that it is another."""
    if any(isinstance(value, str) and HASH.fullmatch(value) for value in (before, now)):
        return f"{name}: the files are others"
    return f"{name} was {before} and is now {now}"


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in target.items():
        tensor.copy_(source[name])
