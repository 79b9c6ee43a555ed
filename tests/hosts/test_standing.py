"""Forwards by hand that are told where they stand, as training tells them."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import ALWAYS, Frames, inputs, transformer

import falloff
from falloff import Method, Plan, Schedule
from falloff.hosts import standing as seam
from falloff.methods import Call, State
from falloff.session import Position

SEEN: list[tuple[int | None, dict[object, object]]] = []


@dataclass(frozen=True, kw_only=True)
class Remembering(Method):
    """Notes the step and what it finds of its own making, and leaves something."""

    name: ClassVar[str] = "remembering"
    schedule: ClassVar[Schedule] = ALWAYS

    seen: int = 1

    def plan(self, call: Call, q_BHND: torch.Tensor, k_BHND: torch.Tensor, v_BHND: torch.Tensor, state: State) -> Plan:
        SEEN.append((call.step, dict(state.values)))
        state.values["left"] = True
        return Frames(seen=self.seen).plan(call, q_BHND, k_BHND, v_BHND, state)


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    SEEN.clear()


def test_a_layer_computed_again_is_planned_as_the_first_time() -> None:
    model = transformer(layers=2)
    model.enable_gradient_checkpointing()
    with falloff.using(model, Remembering()):
        for step in (5, 2):
            with seam.standing(model, Position(step=step, steps=9, branch="cond")):
                out = model(**inputs(), return_dict=False)[0]
            out.square().mean().backward()
    assert SEEN == [(5, {})] * 4 + [(2, {})] * 4  # two layers, twice each


def test_afterwards_forwards_are_followed_as_ever() -> None:
    model = transformer(layers=1)
    with falloff.using(model, Remembering()), torch.no_grad():
        with seam.standing(model, Position(step=5, steps=9, branch="cond")):
            model(**inputs())
        for timestep in (900, 500):
            model(**{**inputs(), "timestep": torch.tensor([timestep])})
    assert [step for step, _ in SEEN] == [5, 0, 1]
    assert SEEN[2][1] == {"left": True}  # later steps of a run do remember


def test_a_model_can_be_dense_for_a_while_and_planned_otherwise() -> None:
    model = transformer(layers=1)
    with torch.no_grad():
        plain = model(**inputs(), return_dict=False)[0]
        with falloff.using(model, Remembering(), kernel="reference"):
            sparse = model(**inputs(), return_dict=False)[0]
            with seam.dense(model, "teacher"):
                assert torch.equal(model(**inputs(), return_dict=False)[0], plain)
                assert [call.reason for call in falloff.report(model).calls][-1] == "teacher"
            seam.replan(model, Remembering(seen=99))
            torch.testing.assert_close(model(**inputs(), return_dict=False)[0], plain)
            with pytest.raises(TypeError, match="the session is of remembering, not of radial"):
                seam.replan(model, falloff.Radial())
    assert not torch.allclose(sparse, plain, atol=1e-4)


def test_without_falloff_nothing_happens() -> None:
    model = transformer(layers=1)
    with seam.standing(model, Position(step=5, steps=9)), seam.dense(model, "teacher"), torch.no_grad():
        model(**inputs())
    assert SEEN == []
