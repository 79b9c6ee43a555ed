"""Families of users: the page about them runs as it stands, and mistakes in a description are told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import falloff
from falloff import hosts
from falloff.hosts import Host, UnsupportedModelError, host_for, latent_grid, register

PAGE = Path(__file__).parents[2] / "docs" / "new-family.md"


@pytest.fixture(autouse=True)
def none_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hosts, "_registered", {})


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    """What the page's program has defined, without what it registered."""
    names: dict[str, Any] = {"__name__": "page"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hosts, "_registered", {})
        exec("\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)), names)
        names["host"] = hosts._registered["Toy"]
    return names


def toy(page: dict[str, Any], **changes: Any) -> Host:
    return Host(**{**vars(page["host"]), **changes})


def test_the_page_is_a_program_that_runs(page: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert page["report"].density < 1
    code = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len(code[code.index("def grid") :].strip().splitlines()) <= 20, "what the page and the error promise"


def test_description_of_the_page_gives_masked_attention(page: dict[str, Any]) -> None:
    """Text is on the side that the page says: it sees all and is seen by all."""
    register(page["host"])
    model, inputs = page["model"], page["inputs"]
    with torch.no_grad(), falloff.using(model, tiny.Frames()):
        model(**inputs)
        mask = falloff.report(model).plan.mask()
    assert mask[..., 120:, :].all()
    assert mask[..., 120:].all()
    assert not mask.all()


def test_grid_of_the_page_is_the_usual_one_and_may_have_a_reason(page: dict[str, Any]) -> None:
    register(page["host"])
    model, inputs = page["model"], page["inputs"]
    usual = latent_grid(lambda config: (1, config.patch, config.patch))
    assert page["grid"](inputs, model.config) == usual(inputs, model.config) == (5, 4, 6)
    odd = {**inputs, "hidden_states": torch.randn(1, 4, 5, 9, 12)}
    with torch.no_grad(), falloff.using(model, tiny.Frames()):
        model(**odd)
        assert falloff.report(model).reasons == {"the size is no multiple of the patch": 3}


def test_unknown_class_is_told_where_to_read(page: dict[str, Any]) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"does not know the model class ToyVideoTransformer; it knows .*"
    ) as e:
        falloff.enable(page["model"], "dense")
    assert "docs/new-family.md and falloff.hosts.register" in str(e.value)
    assert not hasattr(page["model"], "_falloff")


def test_registering_again_replaces(page: dict[str, Any]) -> None:
    register(page["host"])
    changed = toy(page, text_side=None)
    register(changed)
    assert host_for(page["model"]) is changed
    assert hosts.hosts().count(changed) == 1


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"models": "ToyVideoTransformer"}, TypeError, "models of the family Toy must be a tuple of strings, got 'Toy"),
        ({"self_attention": ()}, TypeError, "self_attention of the family Toy must be a tuple"),
        ({"grid": (1, 2, 3)}, TypeError, "grid of the family Toy must be a function"),
        ({"models": ("WanTransformer3DModel",)}, ValueError, "the family Wan has WanTransformer3DModel already"),
        ({"models": ("SanaTransformer2DModel",)}, ValueError, "the family Sana has SanaTransformer2DModel already"),
    ],
)
def test_descriptions_that_cannot_be_are_refused(
    page: dict[str, Any], changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        register(toy(page, **changes))
    assert hosts._registered == {}


def test_two_families_of_users_cannot_have_one_model(page: dict[str, Any]) -> None:
    register(page["host"])
    with pytest.raises(ValueError, match="the family Toy has ToyVideoTransformer already"):
        register(toy(page, family="Other"))


def test_paths_that_lead_nowhere_are_told(page: dict[str, Any]) -> None:
    register(toy(page, self_attention=("block.*.attention",)))
    with pytest.raises(
        UnsupportedModelError, match=r"no module of this ToyVideoTransformer matches block\.\*\.attention"
    ):
        falloff.enable(page["model"], "dense")
    assert not hasattr(page["model"], "_falloff")


def test_forward_without_what_tells_the_step_is_refused(page: dict[str, Any]) -> None:
    class Timeless(page["ToyVideoTransformer"]):
        def forward(self, hidden_states: Any, sigma: Any) -> Any:
            raise AssertionError

    register(toy(page, models=("Timeless",)))
    model = Timeless()
    with pytest.raises(UnsupportedModelError, match="takes hidden_states, sigma, but not timestep"):
        falloff.enable(model, "dense")
    assert not hasattr(model, "_falloff")
    assert not model._forward_pre_hooks
