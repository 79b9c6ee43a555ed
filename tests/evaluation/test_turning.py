"""A dial is turned to where fidelity meets the goal, in few candidates, whichever of its ends is dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

import falloff
from falloff.evaluation import study as studies
from falloff.evaluation import tune as tuning
from falloff.evaluation.candidates import Candidate, Space
from falloff.evaluation.study import Judgement
from falloff.evaluation.tried import Goal
from falloff.evaluation.turning import CLOSE, TURNS, Dial, dials, ends_of_dials, next_turn
from falloff.methods.base import Span

RISING = Dial("contour.density", Span(0.03, 0.5, log=True), falling=False)
FALLING = Dial("vsa.sparsity", Span(0.3, 0.95), falling=True)


def turned(dial: Dial, start: dict[str, Any], fidelity: Callable[[float], float], target: float) -> list[float]:
    """The dial's values in the order tried, the start's first."""
    judged = [(start, fidelity(start[dial.name]))]
    while (point := next_turn(dial, start, judged, target)) is not None:
        assert {**point, dial.name: 0} == {**start, dial.name: 0}
        judged.append((point, fidelity(point[dial.name])))
    return [params[dial.name] for params, _ in judged]


@pytest.mark.parametrize("dial", [RISING, FALLING])
@pytest.mark.parametrize("where", [0.07, 0.2, 0.45, 0.8, 0.97])
def test_few_turns_come_near_to_the_goal(dial: Dial, where: float) -> None:
    values = turned(
        dial, {dial.name: dial.value(0.5), "method": "x"}, lambda value: 100 * dial.place(value), 100 * where
    )
    assert len(values) <= 1 + TURNS
    reached = [dial.place(value) for value in values if dial.place(value) >= where]
    assert min(reached, default=1.0) - where < max(CLOSE, 0.5**TURNS)


def test_a_place_is_a_value_and_back() -> None:
    for dial, sparse in ((RISING, 0.03), (FALLING, 0.95)):
        assert dial.value(0) == sparse
        for place in (0.1, 0.5, 0.9):
            assert dial.place(dial.value(place)) == pytest.approx(place, abs=1e-3)


def test_what_differs_in_more_than_the_dial_tells_nothing() -> None:
    start = {"contour.density": 0.2, "dense_first": 0.25}
    other = {"contour.density": 0.1, "dense_first": 0.0}
    assert next_turn(RISING, start, [(other, 50.0)], 20) is None  # the start is not judged yet
    alone = next_turn(RISING, start, [(start, 50.0)], 20)
    assert alone == next_turn(RISING, start, [(start, 50.0), (other, 1.0)], 20)


def test_a_dial_that_tells_of_no_order_is_left_alone() -> None:
    judged = [({"contour.density": 0.2}, 10.0), ({"contour.density": 0.1}, 30.0)]
    assert next_turn(RISING, judged[0][0], judged, 20) is None


def test_ends_and_the_way_between_them() -> None:
    kinds = [falloff.Contour, falloff.Hyper, falloff.VSA]
    ends = ends_of_dials(kinds)
    assert [type(end) for end in ends] == [falloff.Contour] * 2 + [falloff.VSA] * 2
    assert ends[0] == falloff.Contour(density=0.03)
    found = dials(ends, [0.03, 0.5, 0.7, 0.05])
    assert found == {falloff.Contour: RISING, falloff.VSA: FALLING}
    for kind, dial in found.items():
        assert dial.name in Space([kind], range(4)).defaults(kind)


class Judge:
    """A search whose fidelity is the density asked for; every candidate seems to take the time of refining."""

    space = Space([falloff.Contour], range(4))
    kinds = (falloff.Contour,)
    goal = Goal("recall", 0.1)

    def __init__(self) -> None:
        self.asked: list[float] = []

    def turns(self, trials: Sequence[Any]) -> list[dict[str, Any]]:
        judged = [(trial.params, studies.judgement(trial).fidelity) for trial in trials]
        point = next_turn(RISING, self.space.defaults(falloff.Contour), judged, self.goal.target)
        return [] if point is None else [point]

    def at_once(self) -> int:
        return 1

    def judge(self, candidates: list[Candidate]) -> list[Judgement]:
        self.asked += [candidate.method.settings()["density"] for candidate in candidates]
        return [Judgement(*[candidate.method.settings()["density"]] * 3) for candidate in candidates]

    def seconds_to_refine(self) -> float:
        return 3600.0

    def say(self, _: str) -> None: ...


def test_dials_are_turned_even_in_the_time_to_refine() -> None:
    search = Judge()
    with studies.opened(None, {}) as study:
        tuning._run(search, study, time.monotonic() + 3000)
    assert search.asked[0] == falloff.Contour().density
    assert 2 < len(search.asked) <= 1 + TURNS
    assert min(value for value in search.asked if value >= 0.1) < 0.12
