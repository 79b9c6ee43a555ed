"""Dense against methods, on the same prompts and seeds: what was gained, and what it cost."""

from __future__ import annotations

import dataclasses
import datetime
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor

from falloff import api
from falloff.evaluation import machine
from falloff.evaluation.comparison import Arm, Comparison, MethodArm, Pair
from falloff.evaluation.decay import DecayObserver, Profile
from falloff.evaluation.generate import Generation, check_arguments, generate, recorded, steps
from falloff.evaluation.kept import Kept
from falloff.evaluation.metrics import psnr, ssim
from falloff.evaluation.probe import Probe
from falloff.evaluation.recall import RecallObserver, Recalls
from falloff.evaluation.video import as_file
from falloff.methods import get
from falloff.methods.base import Method
from falloff.recipe import Recipe
from falloff.reporting import Report
from falloff.schedule import Schedule

WARM_UP_STEPS = 2
NO_DENSE = Schedule(dense_first=0, dense_last=0, dense_layers=())
MAP_PIXELS = 256


@dataclass(frozen=True)
class Progress:
    """Denoising steps done of all that a comparison makes, and what it is at."""

    done: int
    total: int
    doing: str


@dataclass(frozen=True)
class _Way:
    """One way to run: plain dense (no method), a method, or the probe, which is dense too.

    ``learned``: the recipe of a method that has learned parameters.
    """

    label: str
    method: Method | None
    schedule: Schedule | None = None
    kernel: str = "auto"
    learned: Recipe | None = None

    def attached(self, pipe: Any, schedule: Schedule | None = None) -> AbstractContextManager[Any]:
        if self.method is None:
            return nullcontext()
        # what was learned is of the layers that its own schedule does not keep dense
        method = self.learned if self.learned is not None and schedule is None else self.method
        schedule = schedule or self.schedule
        return api.using(pipe, method, schedule=schedule, kernel=self.kernel, timing=True)


@dataclass(frozen=True)
class _Outcome:
    """What is kept of one generation, and the session's report of it (none for plain dense)."""

    seconds: float
    peak_bytes: int | None
    others: float | None
    psnr: float
    ssim: float
    video: bytes
    report: Report | None


def compare(
    pipe: Any,
    prompts: str | Iterable[str],
    methods: str | Method | Recipe | Iterable[str | Method | Recipe],
    *,
    seeds: Iterable[int] = (0,),
    schedule: Schedule | Sequence[Schedule] | None = None,
    kernel: str = "auto",
    progress: Callable[[Progress], None] | None = None,
    fps: float = 16,
    kept: Path | None = None,
    **call_arguments: Any,
) -> Comparison:
    """Run dense and each method for every prompt and seed, and tell time, density and fidelity.

    Each pair of prompt and seed is run plainly dense (the time of reference), by each method, and dense once more
    with a probe on its attention: the two dense videos give the noise floor, the probe attention's share of the
    time, its decay with distance, and how much of it each method's plans keep. The order rotates from pair to pair,
    so that a machine that warms up or slows down favours none; short runs of each come first and are not counted.
    ``schedule``, one for all methods or one for each, stands in for their own. ``call_arguments`` go to the pipeline
    as they are. ``kept``: a folder for what every run gave; a comparison goes on there where it was interrupted, or
    with more prompts. Its times are then of several sessions. The files are pickles, so take a folder of your own.

    The pipeline is left as it was, also on an error or an interrupt. Raises ``ValueError`` for no prompts, methods
    or seeds, for unknown methods, for another model's recipe and for a pipeline with a method attached,
    ``TypeError`` for arguments that the pipeline does not take, and ``UnsupportedModelError`` for models of no known
    family.
    """
    pairs = [Pair(prompt, seed) for prompt, seed in product(_several(prompts), seeds)]
    given = _several(methods)
    chosen = [_method(each) for each in given]
    if not pairs or not chosen or not all(pair.prompt.strip() for pair in pairs):
        raise ValueError("a comparison needs at least one prompt that is not empty, one method and one seed")
    check_arguments(pipe, call_arguments)
    _check_plain(pipe)
    decay, recall = DecayObserver(), RecallObserver(methods=tuple(chosen))
    for each in given:
        if isinstance(each, Recipe):
            api.check_recipe(pipe, each)
    schedules = [schedule] * len(chosen) if isinstance(schedule, Schedule | None) else list(schedule)
    sparse = [_way(*way, kernel) for way in zip(_labels(chosen), given, schedules, strict=True)]
    ways = [_Way("dense", None), *sparse, _Way("dense again", Probe(observers=(decay, recall)))]

    told = _Told(
        progress, total=(len(ways) * len(pairs) * steps(pipe, call_arguments)) + len(ways[:-1]) * WARM_UP_STEPS
    )
    runs = _Runs(pipe, ways, pairs, (decay, recall), call_arguments, told, Kept(kept))
    runs.warm_up()
    outcomes = [_run_pair(runs, n, fps) for n in range(len(pairs))]
    dense, *others = [list(column) for column in zip(*outcomes, strict=True)]
    return Comparison(
        model=_model(pipe),
        command=_command(pairs, chosen, schedule, kernel, fps, call_arguments),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        pairs=pairs,
        call_arguments=recorded(call_arguments),
        fps=fps,
        dense=_dense_arm(dense, others[-1]),
        methods=[_method_arm(*arm) for arm in zip(sparse, others[:-1], recall.found, strict=True)],
        decay=decay.profile.curves(),
        machine=machine.describe(torch.device(pipe._execution_device)),
        versions=machine.versions(),
    )


def _model(pipe: Any) -> str:
    return str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__)


def _method(given: str | Method | Recipe) -> Method:
    if isinstance(given, Recipe):
        return given.method
    return get(given) if isinstance(given, str) else given


def _way(label: str, given: str | Method | Recipe, schedule: Schedule | None, kernel: str) -> _Way:
    """A recipe has a schedule and a kernel of its own, which the caller's stand in for."""
    if isinstance(given, Recipe):
        schedule = schedule or given.schedule
        kernel = given.kernel if kernel == "auto" else kernel
        return _Way(label, given.method, schedule, kernel, given if given.branches is not None else None)
    return _Way(label, _method(given), schedule, kernel)


class _Told:
    """Counts steps for a listener."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0
        self.doing = ""

    def step(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, self.doing))


class _Done(NamedTuple):
    """One generation, the session's report of it (none for plain dense), and for the probe all that it has seen."""

    generation: Generation
    report: Report | None
    seen: tuple[Profile, tuple[Recalls, ...]] | None = None


class _Runs:
    """Runs a pipeline in several ways, for each what is not kept from before."""

    def __init__(
        self,
        pipe: Any,
        ways: Sequence[_Way],
        pairs: Sequence[Pair],
        observers: tuple[DecayObserver, RecallObserver],
        call_arguments: dict[str, Any],
        told: _Told,
        kept: Kept,
    ) -> None:
        self._pipe, self.ways, self.pairs, self._arguments = pipe, ways, pairs, call_arguments
        self._observers, self._told, self._kept = observers, told, kept

    def warm_up(self) -> None:
        """A short run of every way that has one to come; the probe's is dense too."""
        short = {**self._arguments, "num_inference_steps": WARM_UP_STEPS}
        for way in self.ways[:-1]:
            if all(self._kept.has(self._key(way, number)) for number in range(len(self.pairs))):
                continue
            self._told.doing = f"warming up {way.label}"
            with way.attached(self._pipe, NO_DENSE):
                first = self.pairs[0]
                generate(self._pipe, first.prompt, seed=first.seed, call_arguments=short, on_step=self._told.step)

    def run(self, index: int, number: int) -> _Done:
        """One way on one pair."""
        way, probes = self.ways[index], index == len(self.ways) - 1
        self._told.doing = f"{way.label}, pair {number + 1} of {len(self.pairs)}"
        done = self._kept.once(self._key(way, number), lambda: self._run(way, self.pairs[number], probes))
        if done.seen is not None:
            self._resume(*done.seen)
        return done

    def _run(self, way: _Way, pair: Pair, probes: bool) -> _Done:
        with way.attached(self._pipe):
            made = generate(
                self._pipe, pair.prompt, seed=pair.seed, call_arguments=self._arguments, on_step=self._told.step
            )
            report = None if way.method is None else api.report(self._pipe)
        decay, recall = self._observers
        return _Done(made, report, (decay.profile, recall.found) if probes else None)

    def _resume(self, profile: Profile, found: tuple[Recalls, ...]) -> None:
        """What the probe has seen up to a pair, whether it was just now or in an earlier session."""
        decay, recall = self._observers
        vars(decay.profile).update(vars(profile))
        for own, before in zip(recall.found, found, strict=True):
            own.calls[:] = before.calls

    def _key(self, way: _Way, number: int) -> str:
        """All that a run depends on; the probe also on the pairs that it saw before."""
        pairs = self.pairs[: number + 1] if way is self.ways[-1] else self.pairs[number]
        return repr((_model(self._pipe), way, pairs, sorted(recorded(self._arguments).items())))


def _run_pair(runs: _Runs, number: int, fps: float) -> list[_Outcome]:
    """Every way once, starting with another one for every pair; outcomes in the order of ``ways``."""
    ways = runs.ways
    order = [(number + place) % len(ways) for place in range(len(ways))]
    done = {index: runs.run(index, number) for index in order}
    dense, again = _as_float(done[0][0]), _as_float(done[len(ways) - 1][0])
    outcomes = []
    for index in range(len(ways)):
        generation, report, _ = done[index]
        # plain dense has nothing to be close to but the second dense run, which is the noise floor
        reference = dense if index else again
        outcomes.append(
            _Outcome(
                seconds=generation.seconds,
                peak_bytes=generation.peak_bytes,
                others=generation.others,
                psnr=psnr(_as_float(generation), reference),
                ssim=ssim(_as_float(generation), reference),
                video=as_file(generation.frames_FHWC, fps),
                report=report,
            )
        )
    return outcomes


def _as_float(generation: Generation) -> Tensor:
    return torch.from_numpy(generation.frames_FHWC).float() / 255


def _dense_arm(outcomes: list[_Outcome], probed: list[_Outcome]) -> Arm:
    return Arm(**_shared("dense", outcomes), **_times(probed))


def _method_arm(way: _Way, outcomes: list[_Outcome], recalls: Recalls) -> MethodArm:
    assert way.method is not None
    reports = _reports(outcomes)
    plan = reports[-1].plan
    sparse = [call for report in reports for call in report.calls if call.reason is None]
    return MethodArm(
        **_shared(way.label, outcomes),
        **_times(outcomes),
        method=way.method.name,
        settings=way.method.settings(),
        schedule=dataclasses.asdict(reports[-1].schedule),
        density=fmean(call.density for call in sparse) if sparse else None,
        effective_density=fmean(report.effective_density for report in reports),
        recall=recalls.mean(),
        recall_by_layer=recalls.by_layer(),
        plan_seconds=fmean(report.plan_seconds for report in reports),
        kernel=str(reports[-1].choice or ""),
        kernels=dict(Counter(call.kernel for call in sparse)),
        reasons=dict(Counter(why for report in reports for why in Counter(report.reasons).elements()).most_common()),
        block_map=None if plan is None else plan.blocks.picture(MAP_PIXELS),
        run_picture=reports[-1].picture(),
    )


def _reports(outcomes: list[_Outcome]) -> list[Report]:
    return [outcome.report for outcome in outcomes if outcome.report is not None]


def _shared(label: str, outcomes: list[_Outcome]) -> dict[str, Any]:
    return {
        "label": label,
        "seconds": [outcome.seconds for outcome in outcomes],
        "peak_bytes": [outcome.peak_bytes for outcome in outcomes],
        "others": [outcome.others for outcome in outcomes],
        "psnr": [outcome.psnr for outcome in outcomes],
        "ssim": [outcome.ssim for outcome in outcomes],
        "videos": [outcome.video for outcome in outcomes],
    }


def _times(outcomes: list[_Outcome]) -> dict[str, Any]:
    """Seconds of the same runs, so that a machine's bad moment does not change their ratios."""
    reports = _reports(outcomes)
    planning = fmean(report.plan_seconds for report in reports)
    return {
        "call_seconds": fmean(outcome.seconds for outcome in outcomes) - planning,
        "attention_seconds": fmean(report.attention_seconds or 0.0 for report in reports),
        "forward_seconds": fmean(report.forward_seconds or 0.0 for report in reports) - planning,
    }


def _check_plain(pipe: Any) -> None:
    """Dense must be dense: raise ``ValueError`` when a method is attached already."""
    try:
        api.report(pipe)
    except api.NotEnabledError:
        return
    raise ValueError("falloff is enabled on this pipeline already; call falloff.disable(pipe) before comparing")


def _labels(methods: Sequence[Method]) -> list[str]:
    """A method's name, with the settings that tell it apart where several share a name.

    Raises ``ValueError`` for a method given twice.
    """
    if any(method in methods[:place] for place, method in enumerate(methods)):
        raise ValueError(f"a method is given twice; compare different ones: {', '.join(map(repr, methods))}")
    labels = []
    for method in methods:
        rivals = [other.settings() for other in methods if other.name == method.name]
        differing = [key for key in rivals[0] if len({str(settings[key]) for settings in rivals}) > 1]
        name = "dense method" if method.name == "dense" else method.name  # plain dense has that name already
        labels.append(" ".join([name, *(f"{key}={method.settings()[key]}" for key in differing)]))
    return labels


def _command(
    pairs: Sequence[Pair],
    methods: Sequence[Method],
    schedule: Schedule | Sequence[Schedule] | None,
    kernel: str,
    fps: float,
    call_arguments: dict[str, Any],
) -> str:
    prompts, seeds = (
        list(dict.fromkeys(pair.prompt for pair in pairs)),
        list(dict.fromkeys(pair.seed for pair in pairs)),
    )
    named = {"seeds": seeds, "schedule": schedule, "kernel": kernel, "fps": fps, **recorded(call_arguments)}
    arguments = "".join(f", {name}={value!r}" for name, value in named.items() if value is not None)
    return f"falloff.compare(pipe, {prompts!r}, {list(methods)!r}{arguments})"


def _several(one_or_more: Any) -> list[Any]:
    return [one_or_more] if isinstance(one_or_more, str | Method | Recipe) else list(one_or_more)
