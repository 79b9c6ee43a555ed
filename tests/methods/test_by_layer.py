"""Layers that differ in one setting."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from falloff import AdaSpa, ByLayer, Grid, Radial, Recipe, Schedule, Sequence, SpargeAttn
from falloff.methods import Call, State

SEQUENCE = Sequence(Grid(4, 4, 8))


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, SEQUENCE.tokens, 8, generator=generator) for _ in "qkv")
    return q, k, v


def call(layer: int, layers: int = 3, step: int = 0) -> Call:
    return Call(sequence=SEQUENCE, layer=layer, layers=layers, step=step, steps=4)


def test_every_layer_has_its_own_value() -> None:
    base = SpargeAttn(q_block=16, kv_block=8)
    method = ByLayer(method=base, setting="keep", values=(0.25, 0.5, 1.0))
    for layer, keep in enumerate((0.25, 0.5, 1.0)):
        own = dataclasses.replace(base, keep=keep).plan(call(layer), *tensors(), State())
        got = method.plan(call(layer), *tensors(), State())
        assert torch.equal(got.blocks.dense(), own.blocks.dense())
    assert (
        ByLayer(method=base).plan(call(7), *tensors(), State()).density
        == base.plan(call(7), *tensors(), State()).density
    )


def test_plans_of_a_static_method_are_made_once_for_a_value() -> None:
    method = ByLayer(method=Radial(block=16), setting="decay", values=(0.1, 0.5, 0.1))
    shared: dict = {}
    plans = [method.plan(call(layer), *tensors(), State(shared=shared)) for layer in (0, 1, 2, 0)]
    assert plans[0] is plans[2] is plans[3]
    assert plans[0].density < plans[1].density


def test_a_method_keeps_its_state_from_call_to_call() -> None:
    method = ByLayer(method=AdaSpa(block=16, search_every=1.0), setting="sparsity", values=(0.5, 0.6, 0.7))
    state = State()
    first, second = (method.plan(call(1, step=step), *tensors(), state) for step in (0, 1))
    assert first is second


def test_it_is_written_down_and_read_back(tmp_path) -> None:
    method = ByLayer(
        method=Radial(block=16),
        setting="decay",
        values=(0.1, 0.5),
    )
    recipe = Recipe(model="M", layers=2, method=method, schedule=Schedule())
    recipe.save(tmp_path / "r.yaml")
    assert Recipe.load(tmp_path / "r.yaml") == recipe
    assert method.settings()["method"] == {"name": "radial", "block": 16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"setting": "decay"}, "setting = 'decay' is none of sparge, which has mode, keep"),
        ({"values": (0.5, 1.5)}, "keep = 1.5 must be above 0 and at most 1"),
        ({"method": 3}, "expected a method, its name or"),
        ({"method": "fast"}, "unknown method 'fast'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByLayer(**settings)


def test_another_number_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="values are for 2 layers, the model has 3"):
        ByLayer(values=(0.5, 0.6)).plan(call(0), *tensors(), State())
