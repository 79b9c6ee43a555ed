from pathlib import Path

import pytest

from falloff import Radial, Recipe, Schedule
from falloff.cli import settings
from falloff.cli.errors import CommandError
from falloff.methods import Full


def test_a_list_is_cut_at_outer_commas() -> None:
    text = "dense, radial(decay=0.5, dense_layers=0,1),radial(block=32)"
    assert settings.parts(text) == ["dense", "radial(decay=0.5, dense_layers=0,1)", "radial(block=32)"]


def test_each_method_has_settings_of_its_own() -> None:
    plain, full, changed = settings.choose_all(
        ["radial", "dense", "radial(decay=0.5, dense_layers=0,1)"], ["block=32", "dense_first=2"]
    )
    assert plain == settings.Chosen(Radial(block=32), Schedule(dense_first=2))
    assert full.method == Full()
    assert changed.method == Radial(block=32, decay=0.5)
    assert changed.schedule == Schedule(dense_first=2, dense_layers=(0, 1))


def test_a_number_or_none() -> None:
    chosen = settings.choose_all(["sparge(skip=12)", "sparge(skip=None)", "sparge"], [])
    assert [choice.method.settings()["skip"] for choice in chosen] == [12.0, None, None]
    with pytest.raises(CommandError, match="skip = 'some' must be a number or none"):
        settings.choose("sparge", ["skip=some"])


def test_a_recipe_is_read_and_amended(tmp_path: Path) -> None:
    recipe = Recipe(
        model="M", layers=2, method=Radial(decay=0.7), schedule=Schedule(dense_first=3, dense_layers=()), kernel="cpu"
    )
    file = tmp_path / "r.yaml"
    recipe.save(file)
    assert settings.choose(str(file), []) == settings.Chosen(recipe, recipe.schedule)
    changed = Recipe(
        model="M",
        layers=2,
        method=Radial(decay=0.7, block=32),
        schedule=Schedule(dense_first=1, dense_layers=()),
        kernel="cpu",
    )
    assert settings.choose(str(file), ["block=32", "dense_first=1"]) == settings.Chosen(changed, changed.schedule)
