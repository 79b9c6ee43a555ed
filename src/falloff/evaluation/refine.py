"""From one setting for all layers to a better one for each: small steps from what a search has found.

A joint search over every layer or head would need more generations than anybody waits for. Layer by layer and head by
head the loss can be measured in one dense run; then the budget goes where it saves most (``allocate``), and a few such
candidates, no denser or no less close than what they come from, are judged like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from falloff.evaluation.allocate import allocate
from falloff.evaluation.candidates import Candidate
from falloff.evaluation.probe import Probe
from falloff.evaluation.recall import Recalls
from falloff.evaluation.windows import STAGES, WindowObserver, to_search
from falloff.methods.base import Method, Span
from falloff.methods.by_layer import ByLayer
from falloff.methods.sta import SlidingTile

LEVELS = (1.0, 0.8, 1.25)
"""Of what the candidate refined from spends: its density for windows, the attention it leaves out for layers."""
VALUES = 8
"""Of a dial that layers choose from, beside the candidate's own."""


@dataclass(frozen=True)
class Finer:
    """Candidates to judge, and what was measured to find them, for the recipe's evidence."""

    candidates: list[Candidate]
    measured: dict[str, Any]


class Looks:
    """How a search looks at a model: ``observe`` runs a probe on every pair, ``recalls`` what methods keep."""

    def __init__(
        self, observe: Callable[[Probe], None], recalls: Callable[[Sequence[Method]], list[Recalls]], steps: int
    ) -> None:
        self.observe, self.recalls, self.steps = observe, recalls, steps


def finer(candidate: Candidate, looks: Looks) -> Finer:
    """By head for sliding tiles, by layer for methods with a dial; nothing for others."""
    if isinstance(candidate.method, SlidingTile):
        return _by_head(candidate, candidate.method, looks)
    if candidate.method.dial is not None:
        return _by_layer(candidate, candidate.method.dial, looks)
    return Finer([], {})


def _by_head(candidate: Candidate, method: SlidingTile, looks: Looks) -> Finer:
    observer = WindowObserver(method=to_search(method, min(STAGES, looks.steps)))
    looks.observe(Probe(observers=(observer,), steps=len(observer.method.until)))
    if not observer.errors:
        return Finer([], {})
    own = observer.densities[0]
    methods = dict.fromkeys(observer.found(level * own) for level in LEVELS)
    return Finer([replace(candidate, method=found) for found in methods], {"windows": observer.evidence()})


def _by_layer(candidate: Candidate, dial: str, looks: Looks) -> Finer:
    method = candidate.method
    values = dial_values(method, dial)
    found = looks.recalls([replace(method, **{dial: value}) for value in values])
    layers = sorted(set().union(*(recalls.by_layer() for recalls in found)))
    if not layers:
        return Finer([], {})
    # a value at which a layer plans nothing leaves it dense: all is kept and all is computed
    kept = np.array([[recalls.by_layer().get(layer, 1.0) for recalls in found] for layer in layers])
    density = np.array([[recalls.density_by_layer().get(layer, 1.0) for recalls in found] for layer in layers])
    own = values.index(getattr(method, dial))
    dense = candidate.schedule.dense_of(len(layers))
    sparse = [place for place, layer in enumerate(layers) if layer not in dense]
    methods: dict[ByLayer, None] = {}
    for level in LEVELS if sparse else ():
        choice = np.full(len(layers), own)
        lost = 1 - kept[sparse]
        choice[sparse] = allocate(density[sparse], lost, level * float(lost[:, own].mean()))
        if (choice != own).any():
            methods[ByLayer(method=method, setting=dial, values=tuple(values[number] for number in choice))] = None
    return Finer(
        [replace(candidate, method=found) for found in methods],
        {
            "layers": {
                "setting": dial,
                "values": values,
                "kept": kept.round(4).tolist(),
                "density": density.round(4).tolist(),
            }
        },
    )


def dial_values(method: Method, dial: str) -> list[float]:
    """A dial's values that layers choose from, rising, the method's own among them."""
    span = method.knobs[dial]
    assert isinstance(span, Span)  # what a dial is
    spaced = np.geomspace if span.log else np.linspace
    values = {round(float(value), 4) for value in spaced(span.low, span.high, VALUES)}
    return sorted(values | {getattr(method, dial)})
