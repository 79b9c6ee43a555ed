import math
from pathlib import Path
from typing import Any

import pytest
from worded import SIZE, pipeline

import falloff
from falloff.evaluation import study as studies
from falloff.evaluation import tune as tuning
from falloff.evaluation.candidates import Candidate, Space
from falloff.evaluation.study import Judgement, TuningError
from falloff.evaluation.tried import Goal, Tried, alike, best, costs
from falloff.evaluation.tune import tune
from falloff.methods import METHODS
from falloff.methods.base import Choices, Span

CALL = {**SIZE, "height": 48, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that a frame of six tokens has several of."""
    knobs = {
        "sink_frames": Span(0, 1),
        "block": Choices((2, 3, "auto")),
        "decay": Span(0.05, 1.0, log=True),
        "neighbour": Choices(("decayed", "full")),
    }
    monkeypatch.setattr(falloff.Radial, "knobs", knobs)


def test_what_stays_dense_counts_as_whole() -> None:
    candidate = Candidate(falloff.Radial(), falloff.Schedule(dense_first=0.25, dense_last=1, dense_layers=(1,)))
    # of eight steps two and one stay dense, of the others one layer of two
    assert candidate.mean({0: 0.5, 1: 0.1}, steps=8) == pytest.approx(3 / 8 + 5 / 8 * (0.5 + 1) / 2)


def test_layers_that_lose_most_are_dense_first() -> None:
    from optuna.trial import FixedTrial

    space = Space([falloff.Radial], sensitive=[4, 0, 2, 1, 3, 5])
    point = space.defaults(falloff.Radial)
    assert point["radial.decay"] == falloff.Radial().decay
    assert point["dense_first"] == falloff.Radial.schedule.dense_first
    chosen = space.suggest(FixedTrial({**point, "radial.block": "2", "dense_layers": 2}))
    assert chosen.method == falloff.Radial(block=2)
    assert chosen.schedule.dense_layers == (0, 4)


def test_recall_goal(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    goal = Goal("recall", 0.8)
    trials = tmp_path / "trials"
    said: list[str] = []
    # Whether there is time to refine is chance here; tests of its own are in test_refine.py.
    monkeypatch.setattr(tuning._Search, "refine", lambda search, plain, deadline: ([], {}))
    found = tune(pipe, "a fox", goal=goal, seconds=1, trials=trials, say=said.append, **CALL)
    reached = [each for each in found.tried if each.judged.fidelity >= goal.target]
    assert len(found.tried) >= 8
    assert min(each.judged.cost for each in found.tried) < 1
    cheapest = min(reached, key=lambda each: each.judged.cost)  # no time was taken, so that nothing is to be smoothed
    assert found.recipe.method == cheapest.candidate.method
    assert found.recipe.schedule == cheapest.candidate.schedule
    assert found.recipe.evidence["goal"] == "80.0% of attention kept"
    assert found.recipe.evidence["compared"][-1]["settings"] == cheapest.candidate.method.settings()
    assert "candidates, best" in "".join(said)
    assert not hasattr(pipe.transformer, "_falloff")
    monkeypatch.setattr(tuning._Search, "compare", lambda search, plain, chosen: found.comparison)
    monkeypatch.setattr(tuning, "_run", lambda search, study, deadline: tuning._round(search, study))
    again = tune(pipe, "a fox", goal=goal, seconds=1, trials=trials, **CALL)
    assert again.tried[: len(found.tried)] == found.tried
    assert len(again.tried) == len(found.tried) + tuning.AT_ONCE
    assert len({str(each) for each in again.tried}) > len(found.tried)  # others than before
    with pytest.raises(TuningError, match=r"trials of another search \(other goal\)"):
        tune(pipe, "a fox", goal=Goal("recall", 0.9), seconds=1, trials=trials, **CALL)
    with pytest.raises(TuningError, match=r"trials of another search \(other kernel\)"):
        tune(pipe, "a fox", goal=goal, seconds=1, trials=trials, kernel="reference", **CALL)
    found.recipe.save(tmp_path / "r.yaml")
    assert falloff.Recipe.load(tmp_path / "r.yaml").method == cheapest.candidate.method


def test_psnr_goal(pipe: Any) -> None:
    found = tune(pipe, ["a fox", "fox fox"], goal=Goal("psnr", 20.0), seconds=0.1, **CALL)
    assert all(each.judged.cost > 0 and each.judged.fidelity > 0 for each in found.tried)
    assert all(0 < each.judged.density <= 1 for each in found.tried)
    assert math.isfinite(found.comparison.methods[-1].psnr[0]) or found.comparison.methods[-1].effective_density == 1
    assert min(found.comparison.methods[-1].psnr) > 10


def test_nothing_reaches_the_goal(pipe: Any) -> None:
    with pytest.raises(TuningError, match=r"candidates reached 300 dB PSNR; the closest had .* dB. Allow more time"):
        tune(pipe, "a fox", goal=Goal("psnr", 300.0), seconds=0.1, **CALL)


def tried_at(*judged: tuple[float, float, float], alike: tuple[str, ...] = ("radial",)) -> list[Tried]:
    """By cost, density and fidelity."""
    return [Tried(Candidate(falloff.Radial(), falloff.Schedule()), Judgement(*each), alike) for each in judged]


def test_the_cheapest_that_reaches_wins() -> None:
    tried = tried_at((0.9, 0.8, 30), (0.7, 0.4, 26), (0.6, 0.2, 24), (0.8, 0.6, 40))
    assert best(tried, Goal("psnr", 25)) == tried[1]


def test_one_lucky_time_does_not_win() -> None:
    """Dense enough to be slower than its neighbours by all that they took, it was timed in a quiet moment."""
    tried = tried_at((0.5, 0.2, 20), (0.62, 0.3, 24), (0.68, 0.4, 26), (0.8, 0.6, 30), (0.6, 0.5, 28))
    assert min(tried, key=lambda each: each.judged.cost + 9 * (each.judged.fidelity < 23)) is tried[-1]
    assert best(tried, Goal("psnr", 23)) is tried[1]


def test_costs_are_a_line_where_times_are() -> None:
    """Planning of one method costs .1, of one of its ways .2 more, of which two runs show two thirds."""
    radial = tried_at((1 - 0.5 * 0.8, 0.2, 20), (1 - 0.5 * 0.4, 0.6, 30))
    plain = tried_at(*((1.1 - 0.5 * (1 - d), d, 20) for d in (0.1, 0.3, 0.5, 0.7)), alike=("contour", "a"))
    fitted = costs([*radial, *plain])
    assert fitted == pytest.approx([each.judged.cost for each in [*radial, *plain]])
    slow = tried_at(*((1.3 - 0.5 * (1 - d), d, 20) for d in (0.1, 0.5)), alike=("contour", "b"))
    fitted = costs([*radial, *plain, *slow])
    assert fitted[-1] - fitted[-2] == pytest.approx(0.5 * 0.4, rel=0.05)
    assert 0.5 * 0.2 < fitted[-2] - fitted[2] < 0.2


def test_times_that_do_not_fall_with_density_are_left_alone() -> None:
    tried = tried_at((0.9, 0.2, 30), (0.5, 0.6, 30))
    assert costs(tried) == [0.9, 0.5]


def test_what_is_turned_is_no_way_of_its_own() -> None:
    one = {"method": "contour", "contour.density": 0.2, "contour.q_tokens": "64", "dense_first": 0.1, "dense_layers": 1}
    assert alike(one) == alike({**one, "contour.density": 0.1, "dense_first": 0.3, "dense_layers": 0})
    assert alike(one) != alike({**one, "contour.q_tokens": "128"})
    assert alike(one) != alike({**one, "contour.projections": 5})


def test_tables_are_told_in_short() -> None:
    method = falloff.ByLayer(values=tuple(round(0.1 + 0.01 * layer, 2) for layer in range(40)))
    words = Tried(Candidate(method, falloff.Schedule()), Judgement(0.5, 0.4, 30), ()).words()
    assert words.startswith("by-layer values=(0.1, 0.11,")
    assert len(words) < 130


def test_settings_that_exclude_each_other_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    knobs = {"window": Choices(("band", "disc")), "order": Choices(("raster", "hilbert"))}
    monkeypatch.setattr(falloff.Radial, "knobs", knobs)

    class Judge:
        space = Space([falloff.Radial], range(2))
        goal = Goal("recall", 0.5)

        def at_once(self) -> int:
            return 30

        def judge(self, candidates: list[Candidate]) -> list[Judgement]:
            return [Judgement(0.5, 0.5, 0.5)] * len(candidates)

        def say(self, _: str) -> None: ...

    with studies.opened(None, {}) as study:
        tuning._round(Judge(), study)
        judged, refused = len(studies.judged(study)), [t for t in study.trials if t.state.name == "FAIL"]
    assert judged + len(refused) == 30
    assert {(t.params["radial.window"], t.params["radial.order"]) for t in refused} == {("band", "hilbert")}


@pytest.mark.parametrize("kind", [kind for kind in METHODS.values() if kind.knobs])
def test_defaults_lie_in_the_space(kind: type[falloff.Method]) -> None:
    from optuna.trial import FixedTrial

    space = Space([kind], range(6))
    candidate = space.suggest(FixedTrial(space.defaults(kind)))  # which raises for values outside
    assert candidate.method == kind()


@pytest.mark.parametrize(
    ("measure", "target", "words"),
    [("recall", 1.5, "outside 0 to 1"), ("psnr", -3, "above 0"), ("recall", 0, "outside 0 to 1")],
)
def test_goals_are_checked(measure: Any, target: float, words: str) -> None:
    with pytest.raises(TuningError, match=words):
        Goal(measure, target)


def test_methods_are_checked(pipe: Any) -> None:
    with pytest.raises(TuningError, match="dense has nothing to tune; choose of radial"):
        tune(pipe, "a fox", ["dense"], goal=Goal("psnr", 20), seconds=1)
    with pytest.raises(ValueError, match="unknown method 'fast'"):
        tune(pipe, "a fox", ["fast"], goal=Goal("psnr", 20), seconds=1)
    with pytest.raises(TuningError, match="at least one prompt"):
        tune(pipe, [], goal=Goal("psnr", 20), seconds=1)
