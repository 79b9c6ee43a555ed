"""What a session does once: the sparse attention of later steps is tried before the first, and outputs are judged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from test_session import CPU, DENSE, SEAT, attend, qkv
from torch import Tensor

import falloff
from falloff import Grid, Schedule
from falloff.kernels import UnsupportedError, reference
from falloff.kernels.choose import OWN
from falloff.kernels.kernel import Kernel
from falloff.methods import Call, Dense, Method, State
from falloff.sanity import OutputError
from falloff.session import MethodError, Position, RehearsalError, Seat, Session

LATER = Schedule(dense_first=2, dense_layers=(0,))
GRID = Grid(3, 2, 2)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A kernel named ``odd``: the queries of every call, a count of plans, and what spoils its output."""
    found: dict[str, Any] = {"queries": [], "plans": 0, "spoil": lambda out: out}

    def attention(plan: Any, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, None]:
        found["queries"].append(q)
        return found["spoil"](reference.attention(plan, q, k, v, *more)[0]), None

    def plan(self: tiny.Frames, *call: Any, _plan: Callable[..., Any] = tiny.Frames.plan) -> Any:
        found["plans"] += 1
        return _plan(self, *call)

    odd = Kernel("odd", "tests", attention, lambda: None, lambda needs: None, by_name="by name only")
    monkeypatch.setattr(sys.modules["falloff.kernels.choose"], "KERNELS", (*OWN, odd))
    monkeypatch.setattr(tiny.Frames, "plan", plan)
    return found


def at(here: Session, step: int, run: int = 0, steps: int | None = 4) -> Session:
    here.begin(Position(run=run, step=step, steps=steps, branch="cond"), CPU)
    return here


def session(method: Method | None = None, schedule: Schedule = LATER, kernel: str = "odd") -> Session:
    return Session(method or tiny.Frames(), schedule=schedule, kernel=kernel)


def test_later_attention_is_tried_once_before_the_first_step(seen: dict[str, Any]) -> None:
    here = session()
    for run in (0, 1):
        for step in (0, 1):
            at(here, step, run)
            for layer in (0, 1, 2):
                attend(here, GRID, Seat(model=0, layer=layer, layers=3))
            here.end()
    assert len(seen["queries"]) == seen["plans"] == 1
    assert here.report().plan is None
    assert here.report().kernels == {"mine": 6}
    attend(at(here, 2, 1), GRID)
    assert len(seen["queries"]) == 2
    assert seen["plans"] == 1


def test_it_is_tried_again_for_another_size_and_type(seen: dict[str, Any]) -> None:
    here = at(session(), 0)
    attend(here, GRID)
    attend(here, Grid(2, 2, 2))
    assert len(seen["queries"]) == 2
    q, k, v = (x.double() for x in qkv(12))
    for _ in range(2):
        here.attend(SEAT, q, k, v, grid=GRID, dense=DENSE)
    assert [x.dtype for x in seen["queries"]] == [torch.float32, torch.float32, torch.float64]
    assert seen["plans"] == 2


def test_one_sample_is_enough_and_its_mask_goes_along(seen: dict[str, Any]) -> None:
    here = at(session(), 0)
    q, k, v = (x.expand(3, -1, -1, -1) for x in qkv(12))
    mask = torch.ones(3, 1, 1, 12, dtype=torch.bool)
    here.attend(SEAT, q, k, v, grid=GRID, dense=DENSE, mask=mask)
    assert [len(x) for x in seen["queries"]] == [1]


@pytest.mark.parametrize(
    ("schedule", "steps", "layer"),
    [
        (Schedule(dense_first=4, dense_layers=()), 4, 1),
        (Schedule(dense_first=2, dense_last=2, dense_layers=()), 4, 1),
        (Schedule(dense_first=2, dense_layers=(1,)), 4, 1),
        (Schedule(dense_first=0.5, dense_layers=()), None, 1),
    ],
)
def test_nothing_is_tried_where_nothing_will_be_sparse(
    seen: dict[str, Any], schedule: Schedule, steps: int | None, layer: int
) -> None:
    here = at(session(schedule=schedule), 0, steps=steps)
    attend(here, GRID, Seat(model=0, layer=layer, layers=2))
    assert seen["queries"] == []


def test_failing_kernel_is_told_at_the_first_step_and_again(seen: dict[str, Any]) -> None:
    def fail(out: Tensor) -> Tensor:
        raise UnsupportedError("out of shared memory")

    seen["spoil"] = fail
    here = at(session(), 0)
    for _ in range(2):
        with pytest.raises(
            RehearsalError, match=r"frames and kernel='odd' in layer 1, step 0, branch cond, 12 tokens"
        ) as caught:
            attend(here, GRID)
        assert "out of shared memory" in str(caught.value)
        assert isinstance(caught.value.__cause__, UnsupportedError)


def test_failing_static_method_is_told_at_the_first_step() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(Method):
        name: ClassVar[str] = "broken"
        static: ClassVar[bool] = True

        def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Any:
            raise ZeroDivisionError("no")

    with pytest.raises(MethodError, match="broken failed to plan layer 1, step 0"):
        attend(at(session(Broken()), 0), GRID)


def test_methods_that_look_at_queries_are_not_asked_early() -> None:
    asked: list[int] = []

    @dataclass(frozen=True, kw_only=True)
    class Looking(Method):
        name: ClassVar[str] = "looking"

        def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Any:
            asked.append(call.step)
            return Dense("not today")

    here = session(Looking())
    for step in range(4):
        attend(at(here, step), GRID)
    assert asked == [2, 3]


def test_gradients_are_those_of_the_dense_call_alone(seen: dict[str, Any]) -> None:
    q, k, v = (x.requires_grad_() for x in qkv(12))
    out, _ = at(session(), 0).attend(SEAT, q, k, v, grid=GRID, dense=DENSE)
    assert seen["queries"][0].requires_grad
    plain = DENSE.run(q, k, v, None, None)
    ours, theirs = (torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, plain))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("step", [0, 2])
def test_black_output_is_told_when_the_forward_is_over(seen: dict[str, Any], step: int) -> None:
    seen["spoil"] = torch.zeros_like
    here = at(session(), step)
    attend(here, GRID)
    with pytest.raises(
        OutputError, match=f"layer 1, step {step}, branch cond, 12 tokens .* by the kernel odd put out nothing"
    ):
        here.end()
    here.end()


def test_every_layer_is_judged_once_a_run(seen: dict[str, Any]) -> None:
    here = session(schedule=tiny.ALWAYS)
    for run in (0, 1):
        for step in (0, 1):
            at(here, step, run)
            for layer in (0, 1):
                attend(here, GRID, Seat(model=0, layer=layer, layers=2))
            assert len(here._looks) == (2 if step == 0 else 0)
            here.end()


def test_training_is_not_held_up(seen: dict[str, Any]) -> None:
    seen["spoil"] = torch.zeros_like
    here = at(session(schedule=tiny.ALWAYS), 0)
    here.attend(SEAT, *(x.requires_grad_() for x in qkv(12)), grid=GRID, dense=DENSE)
    here.end()


def test_a_pipeline_hears_of_a_kernel_that_cannot_run_before_its_second_step(seen: dict[str, Any]) -> None:
    def fail(out: Tensor) -> Tensor:
        raise UnsupportedError("not on this machine")

    seen["spoil"] = fail
    pipe, steps = tiny.t2v(), []
    falloff.enable(pipe, tiny.Frames(), schedule=Schedule(dense_first=0.5, dense_layers=(0,)), kernel="odd")
    with pytest.raises(RehearsalError, match="not on this machine"):
        tiny.generate(pipe, callback_on_step_end=lambda pipe, step, *rest: steps.append(step) or {})
    assert steps == []


def test_a_pipeline_hears_of_black_output_and_of_a_model_with_nan(seen: dict[str, Any]) -> None:
    pipe = tiny.t2v()
    falloff.enable(pipe, tiny.Frames(), kernel="odd")
    tiny.generate(pipe)
    seen["spoil"] = torch.zeros_like
    with pytest.raises(OutputError, match="layer 0, step 0, branch cond"):
        tiny.generate(pipe)
    seen["spoil"] = lambda out: out
    with torch.no_grad():
        pipe.transformer.blocks[1].attn1.to_v.bias.fill_(torch.nan)
    with pytest.raises(OutputError, match=r"layer 1, step 0, .* the model itself made them"):
        tiny.generate(pipe)
