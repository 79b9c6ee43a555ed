"""Windows of their own in every head, layer and stage of a run."""

from __future__ import annotations

import pytest
import torch

from falloff import Grid, Recipe, Schedule, Sequence, SlidingTile, TileWindows, plan_for
from falloff.methods import Call, State

SEQUENCE = Sequence(Grid(6, 8, 8), text=5)
TILE = (2, 4, 4)
WINDOWS = ((1, 1, 1), (3, 1, 1), (1, 2, 2))
METHOD = TileWindows(tile=TILE, windows=WINDOWS, until=(0.5, 1.0), heads=(("012", "000", "111"), ("210", "222", "000")))


def planned(method: TileWindows, layer: int, step: int | None, heads: int = 3, first: int = 0, shared=None):
    x = torch.zeros(1, heads, SEQUENCE.tokens, 4)
    call = Call(sequence=SEQUENCE, layer=layer, layers=3, step=step, steps=10, first_head=first)
    return method.plan(call, x, x, x, State(shared={} if shared is None else shared))


def uniform(window: int) -> torch.Tensor:
    return plan_for(SlidingTile(tile=TILE, window=WINDOWS[window]), SEQUENCE).mask()[0, 0]


@pytest.mark.parametrize(("step", "numbers"), [(0, (0, 1, 2)), (4, (0, 1, 2)), (5, (2, 1, 0)), (None, (2, 1, 0))])
def test_every_head_has_the_window_of_its_stage(step: int | None, numbers: tuple[int, ...]) -> None:
    mask = planned(METHOD, 0, step).mask()
    for head, number in enumerate(numbers):
        assert torch.equal(mask[0, head], uniform(number))


def test_stages_are_shares_of_any_number_of_steps() -> None:
    assert [METHOD.stage(step, 5) for step in range(5)] == [0, 0, 0, 1, 1]
    assert [METHOD.stage(step, 2) for step in range(2)] == [0, 1]


def test_heads_that_another_process_has_are_left_to_it() -> None:
    mask = planned(METHOD, 0, 0, heads=2, first=1).mask()
    assert torch.equal(mask[0, 0], uniform(1))
    assert torch.equal(mask[0, 1], uniform(2))


def test_equal_choices_share_one_plan() -> None:
    shared: dict = {}
    plans = [planned(METHOD, layer, step, shared=shared) for layer, step in ((1, 0), (2, 9), (0, 0), (0, 3))]
    assert plans[0] is plans[1]
    assert plans[2] is plans[3]
    assert plans[0].blocks.shape[1] == 1
    assert torch.equal(planned(TileWindows(tile=TILE, windows=WINDOWS), 2, 0).mask()[0, 0], uniform(0))


def test_it_is_written_down_and_read_back(tmp_path) -> None:
    recipe = Recipe(model="M", layers=3, method=METHOD, schedule=Schedule())
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"windows": ()}, "windows must be 1 to 36, got 0"),
        ({"windows": ((3, 3),)}, "must be three numbers of tiles"),
        ({"until": (0.5,)}, "must rise from above 0 to 1"),
        ({"until": (0.5, 0.5, 1.0)}, "must rise from above 0 to 1"),
        ({"heads": (("0",), ("0",))}, "heads are for 2 stages, until has 1"),
        ({"heads": (("01",),)}, "heads = '01' must be letters of 0, one for every head"),
        ({"tile": (0, 4, 4)}, "tile = "),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TileWindows(**settings)


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="heads are for 1 layers, the model has 3"):
        planned(TileWindows(tile=TILE, heads=(("000",),)), 0, 0)
    with pytest.raises(ValueError, match="heads of layer 0 are 3, the model has more: 4 from number 0 on"):
        planned(METHOD, 0, 0, heads=4)
