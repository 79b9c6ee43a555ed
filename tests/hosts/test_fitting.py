"""Layers of tiny models against dense attention, each for itself."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, run

import falloff
from falloff import SLA, SLA2, VSA, Method, Schedule
from falloff.hosts import fitting
from falloff.hosts.fitting import output_error
from falloff.session import MethodError

METHODS: list[Method] = [
    SLA(q_block=16, kv_block=8, density=0.2),
    SLA2(q_block=16, kv_block=8, density=0.2),
    VSA(gate=True, tile=(1, 2, 2), sparsity=0.7),
]
by_name = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def enabled(method: Method, name: str = "Wan", layers: int = 2, **settings: Any) -> tuple[Any, dict[str, Any]]:
    """A model with parameters that do something, and the arguments of its forward."""
    family = FAMILIES[name] if layers > 1 else FAMILIES[name].shallow()
    model = family.build().requires_grad_(False)
    falloff.enable(model, method, **{"schedule": tiny.ALWAYS, **settings})
    branches, generator = falloff.branches(model).requires_grad_(True), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in branches.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model, FAMILIES[name].arguments((3, 4, 4), batch=2)


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "Mochi"])
@by_name
def test_the_model_is_dense_meanwhile_and_every_parameter_has_a_gradient(method: Method, name: str) -> None:
    model, arguments = enabled(method, name)
    plain = run(FAMILIES[name].build(), arguments)
    sparse, outputs = run(model, arguments), []
    error = output_error(model, lambda: outputs.append(run(model, arguments)))
    assert torch.equal(outputs[0], plain)
    assert not torch.equal(sparse, plain)
    parameters = list(falloff.branches(model).parameters())
    error.backward()
    assert error > 1e-4
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in parameters)
    assert sum(bool(p.grad.any()) for p in parameters if p.grad is not None) >= 0.9 * len(parameters)
    assert torch.equal(run(model, arguments), sparse)


@by_name
def test_gradients_are_those_of_the_mean_over_layers(method: Method) -> None:
    model, arguments = enabled(method)
    for parameter in falloff.branches(model).parameters():
        parameter.data = parameter.data.double()
    model.double()
    arguments = {n: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for n, x in arguments.items()}

    def error() -> torch.Tensor:
        return output_error(model, lambda: model(**arguments))

    error().backward()
    for branch in falloff.branches(model)["0"].values():
        # the estimate of SLA2's share takes no gradient to the router
        parameter = next(p for name, p in branch.named_parameters() if "router" not in name)
        numbers, slopes = parameter.detach().view(-1), parameter.grad.view(-1)
        place = int(slopes.abs().argmax())
        errors = []
        for step in (1e-3, -2e-3):
            numbers[place] += step
            errors.append(float(error().detach()))
        numbers[place] += 1e-3
        assert slopes[place].item() == pytest.approx((errors[0] - errors[1]) / 2e-3, rel=1e-3)


@by_name
def test_the_error_falls(method: Method) -> None:
    model, arguments = enabled(method)
    optimizer = torch.optim.Adam(falloff.branches(model).parameters(), lr=0.01)
    errors = []
    for _ in range(10):
        optimizer.zero_grad()
        error = output_error(model, lambda: model(**arguments))
        error.backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < 0.9 * errors[0]


def test_a_layer_answers_for_itself_alone() -> None:
    model, arguments = enabled(METHODS[0])
    first, second = falloff.branches(model)["0"].values()
    output_error(model, lambda: model(**arguments)).backward()
    before = [p.grad.clone() for p in second.parameters()]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1.0)
    falloff.branches(model).zero_grad()
    output_error(model, lambda: model(**arguments)).backward()
    assert all(torch.equal(p.grad, wanted) for p, wanted in zip(second.parameters(), before, strict=True))


def test_a_plan_that_leaves_nothing_out_has_no_error() -> None:
    model, arguments = enabled(SLA(density=1.0, negligible=0))
    with torch.no_grad():
        for parameter in falloff.branches(model).parameters():
            parameter.zero_()
    assert output_error(model, lambda: model(**arguments)) < 1e-10


def test_without_gradients_the_choice_is_the_hard_one() -> None:
    model, arguments = enabled(METHODS[1])
    soft = output_error(model, lambda: model(**arguments))
    with torch.no_grad():
        hard = output_error(model, lambda: model(**arguments))
    assert soft.requires_grad
    assert not hard.requires_grad
    assert soft != hard
    assert not any(branch.fitting for branch in falloff.branches(model)["0"].values())


def test_padding_says_nothing() -> None:
    out, wanted = torch.ones(2, 3, 1, 1), torch.full((2, 3, 1, 1), 2.0)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    assert fitting._relative(out, wanted, None) == 0.25
    out[0, 2] = torch.nan
    assert fitting._relative(out, wanted, valid) == 0.25


def test_what_stays_dense_has_no_error() -> None:
    model, arguments = enabled(METHODS[0], schedule=Schedule(dense_first=0, dense_layers=(0, 1)))
    assert not output_error(model, lambda: model(**arguments)).requires_grad
    model, arguments = enabled(METHODS[0], schedule=Schedule(dense_first=0, dense_layers=(0,)))
    output_error(model, lambda: model(**arguments)).backward()
    (only,) = falloff.branches(model)["0"].values()
    assert all(bool(parameter.grad.any()) for parameter in only.parameters())


def test_an_error_on_the_way_leaves_the_layers_as_they_were() -> None:
    model, arguments = enabled(METHODS[0])
    sparse = run(model, arguments)

    def fails() -> None:
        model(**arguments)
        raise KeyError("on the way")

    with pytest.raises(KeyError):
        output_error(model, fails)
    assert torch.equal(run(model, arguments), sparse)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it while tracing
def test_compiled_it_is_refused() -> None:
    torch._dynamo.reset()
    model, arguments = enabled(METHODS[0], layers=1)
    target = torch.compile(model, backend="eager")
    with pytest.raises(MethodError, match="sla is fitted to dense attention in eager mode alone"):
        output_error(model, lambda: target(**arguments))
    torch._dynamo.reset()
