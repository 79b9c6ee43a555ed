"""Layers and heads with settings of their own: the allocation, the window search and the refinement of a search."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worded import SIZE, pipeline

import falloff
from falloff import ByLayer, Grid, Radial, Schedule, Sequence, SlidingTile, SpargeAttn, TileWindows
from falloff.evaluation import refine, windows
from falloff.evaluation import tune as tuning
from falloff.evaluation.allocate import allocate
from falloff.evaluation.candidates import Candidate
from falloff.evaluation.recall import Recall, Recalls
from falloff.evaluation.refine import Looks, dial_values, finer
from falloff.evaluation.tried import Goal
from falloff.evaluation.tune import tune
from falloff.evaluation.windows import WindowObserver, to_search
from falloff.methods import METHODS, Call, State
from falloff.methods.base import Choices, Span

CALL = {**SIZE, "height": 48, "num_inference_steps": 2}


def mean(values: np.ndarray, choice: Any) -> float:
    return float(values[np.arange(len(values)), list(choice)].mean())


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 1))
def test_no_other_choice_of_that_cost_loses_less(seed: int, share: float) -> None:
    generator = np.random.default_rng(seed)
    loss, cost = generator.random((4, 3)).round(1), generator.random((4, 3)).round(1)  # rounded, so that some tie
    low, high = cost.min(1).mean(), cost.max(1).mean()
    budget = low + share * (high - low)
    choice = allocate(loss, cost, budget)
    spent, lost = mean(cost, choice), mean(loss, choice)
    assert spent <= budget + 1e-12
    for other in itertools.product(range(3), repeat=4):
        if mean(cost, other) <= spent + 1e-12:
            assert mean(loss, other) >= lost - 1e-9


def test_where_nothing_fits_all_take_their_cheapest() -> None:
    loss, cost = np.array([[0.0, 1.0], [0.0, 1.0]]), np.array([[3.0, 2.0], [4.0, 1.0]])
    assert allocate(loss, cost, 1.0).tolist() == [1, 1]
    assert allocate(loss, cost, 10.0).tolist() == [0, 0]


GRID = Grid(6, 4, 4)


def local_heads() -> tuple[torch.Tensor, ...]:
    """Two heads: one attends to its own frame, the other to its own place in all frames."""
    token = torch.arange(GRID.tokens)
    frame, place = token // 16, token % 16
    codes = [torch.nn.functional.one_hot(frame, 16), torch.nn.functional.one_hot(place, 16)]
    q = 9 * torch.stack([code.float() for code in codes])[None]
    v = torch.randn(1, 2, GRID.tokens, 16, generator=torch.Generator().manual_seed(0))
    return q, 4 * q / 9, v


def observed(method: TileWindows, steps: int = 6) -> WindowObserver:
    observer = WindowObserver(method=method)
    for step in range(steps):
        for layer in range(2):
            call = Call(sequence=Sequence(GRID), layer=layer, layers=2, step=step, steps=steps)
            q, k, v = local_heads()
            heads = [0, 1] if layer == 0 else [1, 0]
            observer.see(call, q[:, heads], k[:, heads], v, State())
    return observer


def test_heads_get_the_windows_that_they_look_through() -> None:
    method = TileWindows(tile=(1, 1, 1), windows=((1, 99, 99), (99, 1, 1), (1, 1, 1)), until=(0.5, 1.0))
    observer = observed(method)
    found = observer.found(budget=0.2)
    assert found.heads == (("01", "10"), ("01", "10"))
    assert found.windows == method.windows
    assert observer.found(budget=1 / GRID.tokens).heads == (("22", "22"), ("22", "22"))  # what is cheapest
    shown = observer.evidence()
    assert [row["window"] for row in shown] == [[1, 99, 99], [99, 1, 1], [1, 1, 1]]
    assert shown[0]["density"] == pytest.approx(1 / 6, abs=1e-4)
    assert all(len(row["error_by_layer"]) == 2 for row in shown)
    assert shown[2]["error_by_layer"][0] > shown[0]["error_by_layer"][0]


def test_the_plan_found_errs_less_than_one_window_for_all() -> None:
    method = SlidingTile(tile=(1, 1, 1), window=(1, 99, 99))
    observer = observed(to_search(method, 1))
    assert observer.method.windows[0] == (1, 99, 99)
    found = observer.found(observer.densities[0])
    q, k, v = local_heads()
    exact = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    call = Call(sequence=Sequence(GRID), layers=2)
    errors = [
        (falloff.attention(q, k, v, each.plan(call, q, k, v, State())) - exact).square().sum()
        for each in (method, found)
    ]
    assert errors[1] < 0.1 * errors[0]


def recalled(methods: Any) -> list[Recalls]:
    """Layer 0 needs little, layer 1 much, layer 2 is in between."""
    need = (8.0, 1.0, 3.0)
    return [
        Recalls([Recall(layer, 1 - 2.0 ** (-need[layer] * method.keep * 4), method.keep) for layer in range(3)])
        for method in methods
    ]


def test_layers_that_need_little_get_little() -> None:
    candidate = Candidate(SpargeAttn(keep=0.5, q_block=32), Schedule(dense_first=0.1, dense_layers=(2,)))
    found = finer(candidate, Looks(lambda probe: None, recalled, steps=4))
    same = found.candidates[0].method
    assert isinstance(same, ByLayer)
    assert same.base == candidate.method
    assert same.values[0] < 0.5
    assert same.values[2] == 0.5  # dense anyway
    assert all(each.schedule == candidate.schedule for each in found.candidates)
    densities = [sum(each.method.values[:2]) for each in found.candidates]
    assert densities[1] > densities[0] > densities[2]  # who may leave out less is denser
    kept = [recalled([each.method.of(layer)])[0].by_layer()[layer] for each in found.candidates[:1] for layer in (0, 1)]
    assert sum(kept) >= sum(recalled([candidate.method])[0].by_layer()[layer] for layer in (0, 1)) - 1e-9
    shown = found.measured["layers"]
    assert shown["setting"] == "keep"
    assert np.array(shown["kept"]).shape == (3, len(shown["values"]))


def test_methods_without_a_dial_are_left_alone() -> None:
    def never(*given: Any) -> Any:
        raise AssertionError(given)

    assert finer(Candidate(falloff.Hyper(), Schedule()), Looks(never, never, 4)).candidates == []


@pytest.mark.parametrize("kind", [kind for kind in METHODS.values() if kind.dial])
def test_dials_are_spans_and_their_values_legal(kind: type[falloff.Method]) -> None:
    assert isinstance(kind.knobs[kind.dial], Span)
    values = dial_values(kind(), kind.dial)
    assert values == sorted(set(values))
    assert getattr(kind(), kind.dial) in values
    assert all(ByLayer(method=kind(), setting=kind.dial, values=(value,)) for value in values)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_run", lambda search, study, deadline: tuning._round(search, study))


@pytest.mark.usefixtures("one_round")
def test_a_search_refines_windows_by_head(pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        SlidingTile, "knobs", {"tile": Choices(("auto", (1, 1, 1))), "window": Choices(((1, 1, 3), (3, 3, 3)))}
    )
    monkeypatch.setattr(windows, "WINDOWS", ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 1)))
    found = tune(pipe, ["a fox", "fox"], ["sta"], goal=Goal("psnr", 5.0), seconds=60, **CALL)
    by_head = [each for each in found.tried if isinstance(each.candidate.method, TileWindows)]
    assert by_head
    assert all(len(layers) == 2 for layers in by_head[0].candidate.method.heads)
    assert found.recipe.evidence["windows"]
    recipe = falloff.Recipe(
        model=found.recipe.model,
        layers=2,
        method=by_head[0].candidate.method,
        schedule=Schedule(dense_first=0, dense_layers=()),
    )
    recipe.save(tmp_path / "r.yaml")
    with falloff.using(pipe, falloff.Recipe.load(tmp_path / "r.yaml")):
        pipe("a fox", output_type="latent", **CALL)
        assert not falloff.report(pipe).reasons


@pytest.mark.usefixtures("one_round")
def test_a_search_refines_a_dial_by_layer(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Radial, "knobs", {"decay": Span(0.05, 1.0, log=True), "block": Choices((2, 3, "auto"))})
    monkeypatch.setattr(refine, "LEVELS", (0.5,))
    found = tune(pipe, "a fox", ["radial"], goal=Goal("recall", 0.6), seconds=60, **CALL)
    by_layer = [each for each in found.tried if isinstance(each.candidate.method, ByLayer)]
    assert by_layer
    assert len(by_layer[0].candidate.method.values) == 2
    assert found.recipe.evidence["layers"]["setting"] == "decay"
