"""Every method on tiny random models, video with and without text and images, and on batches."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, run
from small import small
from tiny import ALWAYS
from torch import Tensor

import falloff
from falloff.methods import METHODS, Call, Dense, Method, State
from falloff.plan import Plan

GRIDS = {"Wan": (7, 6, 9), "HunyuanVideo": (5, 7, 9), "FLUX.1": (1, 17, 19)}
"""Odd sizes."""


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_on_every_kind_of_model(method: str, name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].build()
    if family.image and METHODS[method].needs_frames:
        with pytest.raises(ValueError, match="makes images"):
            falloff.enable(model, method)
        return
    arguments = family.arguments(GRIDS[name], batch=2)
    dense = run(model, arguments)
    with falloff.using(model, small(method), schedule=ALWAYS):
        sparse = run(model, arguments)
        report = falloff.report(model)
    assert len(report.calls) == family.layers
    assert bool(sparse.isfinite().all())
    assert torch.equal(run(model, arguments), dense)
    if method == "dense":
        assert torch.equal(sparse, dense)
    elif report.reasons:
        pytest.fail(f"{method} stayed dense: {report.reasons}")
    else:
        assert 0 < report.density < 1
        assert not torch.equal(sparse, dense)


def planned(method: Method, q: Tensor, k: Tensor) -> Tensor | str:
    """The mask that a method plans, or why it does not."""
    sequence = falloff.Sequence(falloff.Grid(5, 7, 9), text=5)
    made = method.plan(Call(sequence=sequence), q, k, k, State())
    if isinstance(made, Dense):
        return made.reason
    assert isinstance(made, Plan)
    return made.mask().expand(*q.shape[:2], -1, -1)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_two_is_two_batches_of_one(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 3, 320, 8, dtype=torch.float64, generator=generator).unbind()
    both, first, second = (planned(small(name), q[part], k[part]) for part in (slice(0, 2), slice(0, 1), slice(1, 2)))
    if isinstance(both, str):
        assert both == first == second
    else:
        assert isinstance(first, Tensor)
        assert isinstance(second, Tensor)
        assert torch.equal(both, torch.cat([first, second]))


LOOKING = [name for name, method in METHODS.items() if not method.static and name != "sta-windows"]
"""Those whose plans depend on queries and keys."""


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_never_planned_from(name: str, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 2, 320, 8, generator=generator).unbind()
    k[0, 1, 100, 3] = value
    assert "not finite" in str(planned(small(name), q, k))
