"""falloff by its name among diffusers' backends: marks stay, and whatever no method has marked stays dense."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from diffusers import AttentionBackendName, attention_backend
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from families import FAMILIES
from families import run as forward_of
from torch import Tensor

import falloff
from falloff.hosts import op
from falloff.hosts.diffusers import KEY


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As after ``register_diffusers_backend``; the list of names, and the global backend, are as before afterwards."""
    for name in ("_member_map_", "_value2member_map_", "_member_names_"):
        monkeypatch.setattr(AttentionBackendName, name, copy.copy(getattr(AttentionBackendName, name)))
    before = _AttentionBackendRegistry._active_backend
    falloff.register_diffusers_backend()
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def forward(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**tiny.inputs(**more)).sample
    return out


def test_name_is_listed_once_and_found() -> None:
    falloff.register_diffusers_backend()
    assert [member for member in AttentionBackendName if member.value == "falloff"] == [KEY]
    assert AttentionBackendName("falloff") is AttentionBackendName["FALLOFF"] is KEY
    assert KEY.name == "FALLOFF"
    assert copy.deepcopy(KEY) is KEY


def test_enabled_model_stays_enabled_when_it_is_chosen() -> None:
    model = tiny.transformer()
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    sparse = forward(model)
    model.set_attention_backend("falloff")
    assert torch.equal(forward(model), sparse)
    assert falloff.report(model).reasons == {}
    assert len(falloff.report(model).calls) == 4
    falloff.enable(model, "dense", replace=True)
    assert torch.equal(forward(model), plain)
    assert falloff.report(model).kernels == {"native": 2}


def test_model_that_chose_it_before_is_enabled_as_any_other() -> None:
    model = tiny.transformer()
    plain = forward(model)
    model.set_attention_backend("falloff")
    falloff.enable(model, tiny.Frames())
    assert not torch.equal(forward(model), plain)
    falloff.enable(model, "dense", replace=True)
    assert torch.equal(forward(model), plain)
    falloff.disable(model)
    assert torch.equal(forward(model), plain)
    assert model.blocks[0].attn1.processor._attention_backend is KEY


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "LTX", "FLUX.1", "QwenImage"])
def test_models_without_a_method_stay_dense(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES[name].build()
    arguments = FAMILIES[name].arguments((1, 4, 5) if FAMILIES[name].image else (3, 4, 5))
    plain = forward_of(model, arguments)
    monkeypatch.setattr(op, "attend", None)
    model.set_attention_backend("falloff")
    assert torch.equal(forward_of(model, arguments), plain)


def test_global_name_reaches_no_other_model_and_not_itself() -> None:
    """diffusers makes a model's backend that of all models without one; dense calls must not come back here."""
    model, other = tiny.transformer(), tiny.transformer(seed=1)
    plain, theirs = forward(model), forward(other)
    falloff.enable(model, "dense")
    with attention_backend("falloff"):
        assert torch.equal(forward(model), plain)
        assert falloff.report(model).kernels == {"native": 2}
        assert torch.equal(forward(other), theirs)


def test_a_layer_that_failed_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny.transformer(), tiny.transformer(seed=1)
    theirs = forward(other)
    falloff.enable(model, tiny.Frames())
    with monkeypatch.context() as patch:
        patch.setattr(op, "attend", None)
        with pytest.raises(TypeError):
            forward(model)
    other.set_attention_backend("falloff")
    assert torch.equal(forward(other), theirs)
    assert falloff.report(model).calls == []


def test_threads_that_saw_no_layer_yet_stay_dense() -> None:
    model = tiny.transformer()
    plain, seen = forward(model), []
    model.set_attention_backend("falloff")
    thread = threading.Thread(target=lambda: seen.append(forward(model)))
    thread.start()
    thread.join()
    assert torch.equal(seen[0], plain)


def test_compiled_in_one_frame() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, counter = tiny.transformer(layers=4), CompileCounterWithBackend("aot_eager")
    falloff.enable(model, tiny.Frames())
    model.set_attention_backend("falloff")
    sparse = forward(model)
    model.compile_repeated_blocks(backend=counter, fullgraph=True)
    torch.testing.assert_close(forward(model), sparse, atol=1e-6, rtol=1e-6)
    assert counter.frame_count == 1
    torch._dynamo.reset()
