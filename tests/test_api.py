"""The front door: what it takes, what it refuses, and that importing it does nothing."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch

import falloff
from falloff.api import AlreadyEnabledError, NotEnabledError
from falloff.hosts import UnsupportedModelError
from falloff.plan import dense_plan


@pytest.fixture
def pipe() -> Any:
    return tiny.t2v()


def test_import_loads_no_foreign_library_and_touches_no_gpu() -> None:
    code = (
        "import sys, torch; before = torch.nn.functional.scaled_dot_product_attention; import falloff; "
        "assert not {'diffusers', 'transformers', 'torch._dynamo'} & set(sys.modules); "
        "assert not torch.cuda.is_initialized(); "
        "assert torch.nn.functional.scaled_dot_product_attention is before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_seam_leaves_the_enum_alone() -> None:
    from diffusers import AttentionBackendName

    import falloff.hosts.diffusers

    assert falloff.hosts.diffusers.KEY not in list(AttentionBackendName)
    with pytest.raises(ValueError, match="falloff"):
        AttentionBackendName("falloff")


def test_same_object_comes_back(pipe: Any) -> None:
    assert falloff.enable(pipe, "radial") is pipe
    assert falloff.report(pipe).method == falloff.Radial()
    assert falloff.report(pipe).schedule == falloff.Radial.schedule.named(2)
    falloff.disable(pipe)


def test_list_of_transformers_shares_one_session() -> None:
    models = [tiny.transformer(seed=seed) for seed in (0, 1)]
    assert falloff.enable(models, tiny.Frames()) is models
    for model in models:
        model(**tiny.inputs())
    assert [(call.model, call.layer) for call in falloff.report(models).calls] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    falloff.disable(models[1])
    assert falloff.report(models).calls
    falloff.enable(models[1], tiny.Frames())
    with pytest.raises(ValueError, match="one by one"):
        falloff.report(models)


def test_second_enable_needs_replace(pipe: Any) -> None:
    falloff.enable(pipe, "radial")
    with pytest.raises(AlreadyEnabledError, match=r"already enabled here with Radial.*replace=True"):
        falloff.enable(pipe, "dense")
    assert falloff.report(pipe).method == falloff.Radial()
    falloff.enable(pipe, "dense", replace=True)
    assert falloff.report(pipe).method == falloff.Full()


def test_using_leaves_even_after_an_error(pipe: Any) -> None:
    with pytest.raises(KeyError), falloff.using(pipe, "radial"):
        raise KeyError
    with pytest.raises(NotEnabledError, match=r"not enabled on this WanPipeline; call falloff\.enable first"):
        falloff.report(pipe)
    with pytest.raises(NotEnabledError):
        falloff.disable(pipe)


@pytest.mark.parametrize(
    ("given", "settings", "error", "message"),
    [
        ("nothing", {}, ValueError, "unknown method 'nothing'; choose one of .*dense, .*radial"),
        (7, {}, TypeError, "method must be a Method, the name of one or a Recipe, got 7"),
        ("radial", {"kernel": "magic"}, ValueError, "unknown kernel 'magic'; choose auto or one of"),
    ],
)
def test_bad_settings_are_refused_at_the_door(
    pipe: Any, given: Any, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        falloff.enable(pipe, given, **settings)
    with pytest.raises(NotEnabledError):
        falloff.report(pipe)


def test_things_that_are_no_video_transformer_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="expected a diffusers pipeline or transformers, got int"):
        falloff.enable(3, "radial")
    with pytest.raises(
        UnsupportedModelError, match=r"SimpleNamespace has no transformer.* and this pipeline has unet$"
    ):
        falloff.enable(SimpleNamespace(components={"unet": object(), "vae": None}), "radial")
    with pytest.raises(UnsupportedModelError, match="model class Linear"):
        falloff.enable(torch.nn.Linear(1, 1), "radial")


def test_attention_runs_a_plan() -> None:
    q, k, v = (torch.randn(1, 2, 12, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5)
    torch.testing.assert_close(falloff.attention(q, k, v, dense_plan(12, 12, 4), scale=0.5), expected)
