"""The fastest settings that stay close enough to dense: searched on the model at hand, within a time budget.

Candidates are the methods' defaults, what lies between these and the goal on their dials, and what optuna's TPE sampler
draws, which learns from those judged before and prefers ones that reach the target. Fidelity is measured (PSNR of whole
generations against dense), or told from the share of the model's own attention that plans keep, where one dense run
judges many candidates at once. What is found is compared with dense and with the method's defaults on the same prompts,
interleaved, and that comparison goes into the recipe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from falloff import api
from falloff.evaluation import study as studies
from falloff.evaluation.candidates import Candidate, Space
from falloff.evaluation.compare import compare
from falloff.evaluation.comparison import Comparison, Pair
from falloff.evaluation.generate import check_arguments, generate, recorded, steps
from falloff.evaluation.metrics import psnr
from falloff.evaluation.probe import Probe
from falloff.evaluation.recall import RecallObserver, Recalls
from falloff.evaluation.refine import LEVELS, Looks, finer
from falloff.evaluation.study import Judgement, TuningError
from falloff.evaluation.tried import Goal, Tried, alike, best
from falloff.evaluation.turning import Dial, dials, ends_of_dials, next_turn
from falloff.methods import METHODS, get
from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.schedule import Schedule

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

AT_ONCE = 12
"""Candidates judged by recall in one dense run."""
HOPELESS_DB = 3.0
"""A candidate this far below the target on its first pair is given up."""


@dataclass(frozen=True)
class Tuned:
    """The recipe, the comparison behind it, and every candidate in the order tried, earlier sessions' included."""

    recipe: Recipe
    comparison: Comparison
    tried: list[Tried]


class _Dense(NamedTuple):
    """A pair's dense video, float [F, H, W, 3] in 0 to 1, and the seconds it took."""

    video: Tensor
    seconds: float


Say = Callable[[str], None]


def tune(
    pipe: Any,
    prompts: str | Iterable[str],
    methods: Iterable[str] = ("radial",),
    *,
    goal: Goal,
    seconds: float,
    seeds: Iterable[int] = (0,),
    kernel: str = "auto",
    trials: Path | None = None,
    say: Say = lambda doing: None,
    **call_arguments: Any,
) -> Tuned:
    """Search for about ``seconds`` seconds, the last comparison included, and give back the recipe.

    ``trials``: a file that keeps every trial; a search goes on where it was interrupted. ``say`` is told what goes
    on. The pipeline is left as it was. Raises ``TuningError`` for methods without knobs, when nothing reached the
    goal in time, and for the trials of another search, and what ``compare`` raises.
    """
    started = time.monotonic()
    pairs = [Pair(*pair) for pair in product([prompts] if isinstance(prompts, str) else prompts, seeds)]
    wanted = kinds(methods)
    check_arguments(pipe, call_arguments)
    if not pairs:
        raise TuningError("a search needs at least one prompt and one seed")
    search = _Search(pipe, pairs, wanted, goal, kernel, say, call_arguments)
    with studies.opened(trials, search.identity()) as study:
        search.prepare()
        deadline = started + seconds - search.seconds_to_compare()
        _run(search, study, deadline)
        tried = [search.tried(trial) for trial in studies.judged(study)]
    plain = best(tried, goal)
    refined, measured = search.refine(plain, deadline)
    tried += refined
    chosen = best(tried, goal)
    comparison = search.compare(plain, chosen)
    return Tuned(search.recipe(chosen, comparison, len(tried), measured), comparison, tried)


def kinds(names: str | Iterable[str]) -> list[type[Method]]:
    """Methods by name. Raises ``TuningError`` for one without knobs, and ``ValueError`` for one unknown."""
    found = [type(get(name)) for name in dict.fromkeys([names] if isinstance(names, str) else names)]
    tunable = ", ".join(name for name, method in METHODS.items() if method.knobs)
    for kind in found:
        if not kind.knobs:
            raise TuningError(f"{kind.name} has nothing to tune; choose of {tunable}")
    if not found:
        raise TuningError(f"no method to tune; choose of {tunable}")
    return found


class _Search:
    """What stays the same for all candidates."""

    def __init__(
        self,
        pipe: Any,
        pairs: list[Pair],
        kinds: list[type[Method]],
        goal: Goal,
        kernel: str,
        say: Say,
        call_arguments: dict[str, Any],
    ) -> None:
        self._pipe, self._pairs, self.kinds, self.goal = pipe, pairs, kinds, goal
        self._kernel, self.say, self._arguments = kernel, say, call_arguments
        self._steps = steps(pipe, call_arguments)
        self._model, self._layers = api.identities(pipe)[0]
        self._dense: list[_Dense] = []
        self._dials: dict[type[Method], Dial] = {}
        self.space = Space(kinds, range(self._layers))

    def identity(self) -> dict[str, Any]:
        """What trials must have in common to be of one search."""
        return {
            "model": [self._model, self._layers],
            "pairs": [[pair.prompt, pair.seed] for pair in self._pairs],
            "methods": [kind.name for kind in self.kinds],
            "goal": str(self.goal),
            "kernel": self._kernel,
            "call": {name: str(value) for name, value in recorded(self._arguments).items()},
        }

    def prepare(self) -> None:
        """Dense videos to compare with, and which layers lose most by the defaults."""
        short = {**self._arguments, "num_inference_steps": 1}
        self.say("warming up")
        generate(self._pipe, self._pairs[0].prompt, seed=self._pairs[0].seed, call_arguments=short)
        for number, pair in enumerate(self._pairs, 1):
            self.say(f"dense, pair {number} of {len(self._pairs)}")
            made = generate(self._pipe, pair.prompt, seed=pair.seed, call_arguments=self._arguments)
            self._dense.append(_Dense(_as_float(made.frames_FHWC), made.seconds))
        self.say("which layers need their attention most")
        ends = ends_of_dials(self.kinds)
        recalls = self._recalls([*(kind() for kind in self.kinds), *ends])
        losses = [found.by_layer() for found in recalls[: len(self.kinds)]]
        sensitive = sorted(range(self._layers), key=lambda layer: min(kept.get(layer, 1.0) for kept in losses))
        self.space = Space(self.kinds, sensitive)
        density = [fmean(found.density_by_layer().values() or [1.0]) for found in recalls[len(self.kinds) :]]
        self._dials = dials(ends, density)

    def turns(self, trials: Sequence[FrozenTrial]) -> list[dict[str, Any]]:
        """Of every method the next place of its dial to try."""
        judged = [(trial.params, studies.judgement(trial).fidelity) for trial in trials]
        starts = ((dial, self.space.defaults(kind)) for kind, dial in self._dials.items())
        found = (next_turn(dial, start, judged, self.goal.target) for dial, start in starts)
        return [point for point in found if point is not None]

    def seconds_to_compare(self) -> float:
        """Dense twice, the defaults, the best and what it was refined from, and short runs first."""
        return 5 * self._seconds() + 8 / self._steps * self._dense[0].seconds

    def seconds_to_refine(self) -> float:
        """A dense run to look, and one of every candidate."""
        return (1 + len(LEVELS)) * self._seconds()

    def tried(self, trial: FrozenTrial) -> Tried:
        from optuna.trial import FixedTrial

        candidate = self.space.suggest(FixedTrial(trial.params))
        return Tried(candidate, studies.judgement(trial), alike(trial.params))

    def judge(self, candidates: list[Candidate]) -> list[Judgement]:
        if self.goal.measure == "recall":
            recalls = self._recalls([candidate.method for candidate in candidates])
            return [self._by_recall(*judged) for judged in zip(candidates, recalls, strict=True)]
        return [self._by_psnr(candidate) for candidate in candidates]

    def at_once(self) -> int:
        return AT_ONCE if self.goal.measure == "recall" else 1

    def refine(self, plain: Tried, deadline: float) -> tuple[list[Tried], dict[str, Any]]:
        """Candidates that differ by layer or head, judged, and what was measured; none where time is short."""
        if time.monotonic() + 2 * self._seconds() > deadline:
            return [], {}
        self.say("which layers and heads can do with less")
        found = finer(plain.candidate, Looks(self._observe, self._recalls, self._steps))
        tried: list[Tried] = []
        for candidate in found.candidates:
            if time.monotonic() + self._seconds() > deadline:
                break
            (judged,) = self.judge([candidate])
            tried.append(Tried(candidate, judged, plain.alike))
            self.say(f"refined, {len(tried)} of {len(found.candidates)}")
        return tried, found.measured

    def compare(self, plain: Tried, best: Tried) -> Comparison:
        """The best, what it was refined from, its method's defaults and dense, interleaved."""
        default = type(plain.candidate.method)()
        ways: dict[Method, Schedule] = {default: default.schedule}  # one of each method, the last schedule given
        ways |= {each.candidate.method: each.candidate.schedule for each in (plain, best)}
        methods, schedules = list(ways), list(ways.values())
        return compare(
            self._pipe,
            list(dict.fromkeys(pair.prompt for pair in self._pairs)),
            methods,
            seeds=list(dict.fromkeys(pair.seed for pair in self._pairs)),
            schedule=schedules,
            kernel=self._kernel,
            progress=lambda now: self.say(f"comparing, {now.doing}"),
            **self._arguments,
        )

    def recipe(self, best: Tried, comparison: Comparison, count: int, measured: dict[str, Any]) -> Recipe:
        values = comparison.to_dict()
        keep = ("created", "call_arguments", "pairs", "machine", "versions")
        figures = (
            "label",
            "speedup",
            "speedups",
            "psnr",
            "ssim",
            "effective_density",
            "recall",
            "settings",
            "schedule",
        )
        return Recipe(
            model=self._model,
            layers=self._layers,
            method=best.candidate.method,
            schedule=best.candidate.schedule,
            kernel=self._kernel,
            evidence={
                "goal": str(self.goal),
                "candidates": count,
                **{name: values[name] for name in keep},
                "compared": [{name: arm[name] for name in figures} for arm in values["methods"]],
                **measured,
            },
        )

    def _recalls(self, methods: Sequence[Method]) -> list[Recalls]:
        """What each method keeps of the first pair's attention, from one dense run."""
        observer = RecallObserver(methods=tuple(methods))
        pair = self._pairs[0]
        with api.using(self._pipe, Probe(observers=(observer,))):
            generate(self._pipe, pair.prompt, seed=pair.seed, call_arguments=self._arguments)
        return list(observer.found)

    def _observe(self, probe: Probe) -> None:
        """Show every pair's dense run to a probe."""
        for pair in self._pairs:
            with api.using(self._pipe, probe):
                generate(self._pipe, pair.prompt, seed=pair.seed, call_arguments=self._arguments)

    def _seconds(self) -> float:
        """Of one dense run of all pairs."""
        return sum(dense.seconds for dense in self._dense)

    def _by_recall(self, candidate: Candidate, found: Recalls) -> Judgement:
        if not found.calls:
            return Judgement(1.0, 1.0, 1.0)  # it plans nothing, so that every call stays dense
        density = candidate.mean(found.density_by_layer(), self._steps)
        return Judgement(density, density, candidate.mean(found.by_layer(), self._steps))

    def _by_psnr(self, candidate: Candidate) -> Judgement:
        shares, densities, fidelity = [], [], []
        for pair, dense in zip(self._pairs, self._dense, strict=True):
            with api.using(self._pipe, candidate.method, schedule=candidate.schedule, kernel=self._kernel):
                made = generate(self._pipe, pair.prompt, seed=pair.seed, call_arguments=self._arguments)
                densities.append(api.report(self._pipe).effective_density)
            shares.append(made.seconds / dense.seconds)
            fidelity.append(min(psnr(_as_float(made.frames_FHWC), dense.video), 100.0))  # equal videos have no PSNR
            if fidelity[0] < self.goal.target - HOPELESS_DB:
                break
        return Judgement(median(shares), fmean(densities), fmean(fidelity))


def _run(search: _Search, study: Study, deadline: float) -> None:
    """Ask for candidates and judge them until the next ones would take too long; one at least.

    The methods' own defaults come before any other, and then what lies on their dials towards the goal. When these are
    done, time is left to refine what was found.
    """
    if not studies.judged(study):
        for kind in search.kinds:
            study.enqueue_trial(search.space.defaults(kind))
    longest = 0.0
    while True:
        judged = studies.judged(study)
        turns = search.turns(judged)
        ahead = len(judged) < len(search.kinds) or bool(turns)
        until = deadline if ahead else deadline - search.seconds_to_refine()
        if judged and time.monotonic() + longest >= until:
            return
        for point in turns:
            study.enqueue_trial(point, skip_if_exists=True)
        began = time.monotonic()
        _round(search, study)
        longest = max(longest, time.monotonic() - began)


def _round(search: _Search, study: Study) -> None:
    """Judge as many candidates as are judged at once, those left out whose settings exclude each other."""
    trials, candidates = [], []
    for trial in [study.ask() for _ in range(search.at_once())]:
        try:
            candidates.append(search.space.suggest(trial))
            trials.append(trial)
        except ValueError:
            studies.refuse(study, trial)
    for trial, judged in zip(trials, search.judge(candidates), strict=True):
        studies.tell(study, trial, judged, search.goal.target)
    search.say(_words(search, studies.judged(study)))


def _words(search: _Search, trials: list[FrozenTrial]) -> str:
    """How far the search is."""
    judged = map(studies.judgement, trials)
    reached = [each.cost for each in judged if each.fidelity >= search.goal.target]
    what = "of the dense time" if search.goal.measure == "psnr" else "effective density"
    best = f"best {100 * min(reached):.0f}% {what}" if reached else "none has reached the goal"
    return f"{len(trials)} candidates, {best}"


def _as_float(frames: Any) -> Tensor:
    return torch.from_numpy(frames).float() / 255
