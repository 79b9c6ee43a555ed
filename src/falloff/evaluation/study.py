"""optuna, as ``tune`` uses it: trials that a file keeps, a sampler that minds the target, and no chatter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial, Trial

FIRST_AT_RANDOM = 8
"""Candidates drawn at random before the sampler relies on what it has seen."""


class TuningError(ValueError):
    """Nothing to search, nothing found, or trials of another search."""


class Judgement(NamedTuple):
    """Of one candidate. cost: time as a share of dense, or effective density where recall is the goal; density: the
    share of token pairs computed over all layers and steps, dense ones included."""

    cost: float
    density: float
    fidelity: float


@contextmanager
def opened(file: Path | None, search: dict[str, Any]) -> Iterator[Study]:
    """The study in a file, made there if need be, or in memory.

    ``search``: what trials must have in common; raises ``TuningError`` when those in the file differ.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = None if file is None else JournalStorage(JournalFileBackend(str(file)))
            study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
            kept = study.user_attrs.get("search", search)
            if kept != search:
                differing = ", ".join(name for name in search if kept.get(name) != search[name])
                raise TuningError(f"{file} keeps the trials of another search (other {differing}); take another file")
            study.set_user_attr("search", search)
            study.sampler = optuna.samplers.TPESampler(
                seed=len(study.trials),  # a search that goes on must not draw the same candidates again
                n_startup_trials=FIRST_AT_RANDOM,
                multivariate=True,
                group=True,
            )
            yield study
    finally:
        optuna.logging.set_verbosity(before)


def tell(study: Study, trial: Trial, judged: Judgement, target: float) -> None:
    for name, value in judged._asdict().items():
        trial.set_user_attr(name, value)
    trial.set_constraint("short of the goal", target - judged.fidelity)  # above 0: not reached
    study.tell(trial, judged.cost)


def refuse(study: Study, trial: Trial) -> None:
    """A candidate whose settings exclude each other."""
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.FAIL)


def judged(study: Study) -> list[FrozenTrial]:
    """Trials with a judgement, in the order tried."""
    return [trial for trial in study.get_trials() if set(Judgement._fields) <= trial.user_attrs.keys()]


def judgement(trial: FrozenTrial) -> Judgement:
    """Of a trial that was judged."""
    return Judgement(*(trial.user_attrs[name] for name in Judgement._fields))
