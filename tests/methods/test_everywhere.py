"""Every method on tiny random models: video with and without text, and images."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, Family, run
from tiny import ALWAYS

import falloff
from falloff.methods import METHODS

GRIDS = {"Wan": (7, 6, 9), "HunyuanVideo": (5, 7, 9), "FLUX.1": (1, 17, 19)}
"""Odd sizes, and large enough for something to be left out."""


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_every_kind_of_model(method: str, name: str) -> None:
    family: Family = FAMILIES[name]
    model = family.build()
    if family.image and METHODS[method].needs_frames:
        with pytest.raises(ValueError, match="makes images"):
            falloff.enable(model, method)
        return
    single, double = (family.arguments(GRIDS[name], batch) for batch in (1, 2))
    dense = run(model, double)
    with falloff.using(model, method, schedule=ALWAYS):
        out = run(model, double)
        report = falloff.report(model)
        alone = run(model, {**double, **{key: first(value, double, single) for key, value in double.items()}})
    assert out.shape == dense.shape
    assert bool(out.isfinite().all())
    assert len(report.calls) == family.layers
    torch.testing.assert_close(alone, out[:1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(model, double), dense, rtol=0, atol=0)
    if method != "dense":
        assert report.reasons == {}
        assert 0 < report.density <= 1


def first(value: object, double: dict[str, object], single: dict[str, object]) -> object:
    """An argument for the first sample alone, where it is for each."""
    if not isinstance(value, torch.Tensor):
        return value
    samples = double["hidden_states"].shape[0]
    return value[:1] if value.shape[0] == samples and value.ndim > 0 else value
