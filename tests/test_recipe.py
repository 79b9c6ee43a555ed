import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import transformer

import falloff
from falloff import Radial, Recipe, RecipeError, Schedule
from falloff.api import BranchError, NotEnabledError

MODEL = "WanTransformer3DModel"
RECIPE = Recipe(
    model=MODEL,
    layers=2,
    method=Radial(decay=0.7, block=16),
    schedule=Schedule(dense_first=2, dense_last=0.1, dense_layers=(1,)),
    kernel="cpu",
    evidence={"psnr": [21.5, 22.0], "machine": {"cores": 2}},
)


def test_a_file_gives_back_the_recipe(tmp_path: Path) -> None:
    RECIPE.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == RECIPE
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_learned_parameters_move_with_the_recipe(tmp_path: Path) -> None:
    learned = dataclasses.replace(RECIPE, branches=str(tmp_path / "branches.safetensors"))
    learned.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path / "recipe.yaml") == learned
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "recipe.yaml").rename(moved / "recipe.yaml")
    found = Recipe.load(moved / "recipe.yaml")
    assert found.branches == str(moved / "branches.safetensors")
    model = transformer()
    with pytest.raises(BranchError):  # radial learns nothing
        falloff.enable(model, dataclasses.replace(found, kernel="auto"))
    with pytest.raises(NotEnabledError):
        falloff.report(model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"falloff": 2}, "format 2, this falloff reads up to 1; install a newer one"),
        ({"method": "radail"}, "unknown method 'radail'"),
        ({"settings": {"decays": 1}}, "no setting 'decays'"),
        ({"settings": {"decay": -1}}, "decay = -1"),
        ({"schedule": {"dense_first": 1.5}}, "outside 0.0 to 1.0"),
        ({"schedule": {"dense": 1}}, "dense"),
        ({"model": None}, "a recipe needs model"),
        ({"speed": 3}, "a recipe has no speed"),
    ],
)
def test_what_is_no_recipe_is_told(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    values = {name: value for name, value in (RECIPE.to_dict() | change).items() if value is not None}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(tmp_path / "r.yaml")
    assert "r.yaml: " in str(caught.value)


@pytest.mark.parametrize(("text", "words"), [("a: [", "is no YAML file"), ("- 1", "maps names to values, got list")])
def test_what_is_no_mapping_is_told(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError, match=words):
        Recipe.load(tmp_path / "r.yaml")


def test_enable_takes_a_recipe() -> None:
    model = transformer(layers=2)
    falloff.enable(model, RECIPE)
    report = falloff.report(model)
    assert (report.method, report.schedule) == (RECIPE.method, RECIPE.schedule)
    falloff.enable(model, RECIPE, schedule=Schedule(), replace=True)
    assert falloff.report(model).schedule == Schedule().named(2)


def test_a_recipe_for_another_model_is_refused() -> None:
    model = transformer(layers=3)
    with pytest.raises(RecipeError, match=r"WanTransformer3DModel with 2 self-attention layers, this is .* with 3"):
        falloff.enable(model, RECIPE)
    with pytest.raises(NotEnabledError):
        falloff.report(model)
