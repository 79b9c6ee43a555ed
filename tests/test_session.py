"""A session without any model: decisions, plans, statistics, and what a report says."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from falloff import Full, Grid, Method, Radial, Schedule
from falloff.kernels import UnsupportedError, reference, run
from falloff.kernels.choose import OWN
from falloff.kernels.kernel import Kernel
from falloff.methods import Call, State
from falloff.plans import PLANS_KEPT
from falloff.session import DenseBackend, MethodError, Position, Seat, Session

SEAT = Seat(model=0, layer=1, layers=2)
CPU = torch.device("cpu")


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


DENSE = DenseBackend(name=lambda: "mine", run=attention)


def qkv(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, 2, 8, generator=generator) for _ in range(3)]


def session(method: Method | None = None, **settings: Any) -> Session:
    made = Session(method or tiny.Frames(), **{"schedule": tiny.ALWAYS, **settings})
    made.begin(Position(), CPU)
    return made


def attend(here: Session, grid: Grid, seat: Seat = SEAT, **more: Any) -> Tensor:
    return here.attend(seat, *qkv(more.pop("tokens", grid.tokens)), grid=grid, dense=DENSE, **more)[0]


def test_plan_is_run_and_noted() -> None:
    here = session(timing=True)
    out = attend(here, Grid(3, 2, 2))
    report = here.report()
    mask = report.plan.mask()
    expected = scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv(12)), attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    (call,) = report.calls
    assert (call.run, call.model, call.layer, call.reason) == (0, 0, 1, None)
    assert call.density == pytest.approx(5 / 9)
    assert call.attention_seconds > 0


def test_a_named_kernel_without_an_lse_serves_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    lean = Kernel(
        "lean",
        "tests",
        lambda *call: (reference.attention(*call)[0], None),
        lambda: None,
        lambda needs: "it gives no LSE" if needs.lse else None,
        by_name="by name only",
    )
    monkeypatch.setattr(sys.modules["falloff.kernels.choose"], "KERNELS", (*OWN, lean))
    here = session(kernel="lean")
    torch.testing.assert_close(attend(here, Grid(3, 2, 2)), attend(session(), Grid(3, 2, 2)))
    report = here.report()
    assert report.calls[0].kernel == "lean"
    q, k, v = (x.transpose(1, 2) for x in qkv(12))
    with pytest.raises(UnsupportedError, match="gives no LSE"):
        run(report.plan, q, k, v, impl="lean")


def test_key_validity_and_scale_reach_kernel_and_backend() -> None:
    mask = torch.ones(1, 1, 1, 12, dtype=torch.bool)
    mask[..., 10:] = False
    dense = attend(session(Full()), Grid(3, 2, 2), mask=mask, scale=0.5)
    full = attend(session(tiny.FULL, kernel="cpu"), Grid(3, 2, 2), mask=mask, scale=0.5)
    torch.testing.assert_close(dense, full)
    assert not torch.allclose(dense, attend(session(Full()), Grid(3, 2, 2), scale=0.5))


@pytest.mark.parametrize("mask", [torch.ones(1, 1, 12, 12, dtype=torch.bool), torch.zeros(1, 1, 1, 12)])
def test_mask_that_is_not_over_keys_keeps_a_call_dense(mask: Tensor) -> None:
    mask[..., 10:] = -9.0 if mask.is_floating_point() else False
    here = session()
    assert torch.equal(attend(here, Grid(3, 2, 2), mask=mask), attend(session(Full()), Grid(3, 2, 2), mask=mask))
    (reason,) = here.report().reasons
    assert "is not over keys alone" in reason


def test_plan_that_leaves_nothing_out_is_the_models_own_attention() -> None:
    here = session(tiny.FULL)
    assert torch.equal(attend(here, Grid(3, 2, 2)), attend(session(Full()), Grid(3, 2, 2)))
    report = here.report()
    assert (report.kernels, report.reasons, report.density) == ({"mine": 1}, {}, 1.0)
    assert report.choice == "mine: the plan leaves nothing out: the model's own attention"
    named = session(tiny.FULL, kernel="cpu")
    attend(named, Grid(3, 2, 2))
    assert named.report().kernels == {"cpu": 1}


def test_forward_that_stays_dense_says_why() -> None:
    here = session()
    here.begin(Position(), CPU, "no grid today")
    attend(here, Grid(3, 2, 2))
    assert here.report().reasons == {"no grid today": 1}


def test_cross_attention_stays_dense() -> None:
    here = session()
    q, k, v = qkv(12)
    here.attend(SEAT, q, k[:, :5], v[:, :5], grid=Grid(3, 2, 2), dense=DENSE)
    assert here.report().reasons == {"12 queries attend to 5 keys: no self-attention": 1}


def test_text_where_the_family_has_some() -> None:
    seen: list[Call] = []

    @dataclass(frozen=True, kw_only=True)
    class Listening(tiny.Frames):
        def plan(self, call: Call, *args: Any) -> Any:
            seen.append(call)
            return Full().plan(call, *args)

    here = session(Listening())
    attend(here, Grid(3, 2, 2), Seat(model=0, layer=0, layers=1, text_side="before"), tokens=15)
    assert (seen[0].sequence.text, seen[0].sequence.text_side) == (3, "before")
    attend(here, Grid(3, 2, 2), tokens=15)
    assert here.report().reasons["15 tokens do not fit the grid 3x2x2 of 12"] == 1


def test_static_plans_are_kept_for_a_few_sizes() -> None:
    here = session()
    attend(here, Grid(2, 2, 2))
    first = here.report().plan
    for frames in range(2, PLANS_KEPT + 2):
        attend(here, Grid(frames, 2, 2))
    assert len(here._plans) == PLANS_KEPT
    attend(here, Grid(PLANS_KEPT + 2, 2, 2))
    attend(here, Grid(2, 2, 2))
    assert here.report().plan is not first


def test_a_run_forgets_the_one_before() -> None:
    here = session(timing=True)
    attend(here, Grid(2, 2, 2))
    here.end()
    assert here.report().forward_seconds > 0
    here.begin(Position(run=1), CPU)
    report = here.report()
    assert report.calls == []
    assert report.plan is None
    assert report.density == report.effective_density == 1.0


def test_state_is_shared_between_layers_and_forgotten_by_the_next_run() -> None:
    seen: list[tuple[dict[Any, Any], dict[Any, Any]]] = []

    @dataclass(frozen=True, kw_only=True)
    class Counting(tiny.Frames):
        static: ClassVar[bool] = False

        def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Any:
            state.values["own"] = state.values.get("own", 0) + 1
            state.shared["all"] = state.shared.get("all", 0) + 1
            seen.append((dict(state.values), dict(state.shared)))
            return super().plan(call, q_BHND, k_BHND, v_BHND, state)

    here = session(Counting())
    for layer in (0, 0, 1):
        attend(here, Grid(3, 2, 2), Seat(model=0, layer=layer, layers=2))
    here.begin(Position(run=1), CPU)
    attend(here, Grid(3, 2, 2))
    assert seen == [({"own": n}, {"all": m}) for n, m in ((1, 1), (2, 2), (1, 3), (1, 1))]


def test_failing_method_is_named_with_its_call() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Broken(Method):
        name: ClassVar[str] = "broken"

        def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Any:
            raise ZeroDivisionError("no")

    here = session(Broken())
    here.begin(Position(step=3, steps=9, branch="cond"), CPU)
    with pytest.raises(MethodError, match="broken failed to plan layer 1, step 3, branch cond, 12 tokens") as caught:
        attend(here, Grid(3, 2, 2))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_report_reads_well_and_is_json() -> None:
    here = session(Radial(block=4, decay=0.0), schedule=Schedule(dense_first=0, dense_layers=(0,)), timing=True)
    for layer in (0, 1):
        attend(here, Grid(9, 4, 4), Seat(model=0, layer=layer, layers=2))
    here.end()
    report = here.report()
    text = str(report)
    for expected in (
        "radial decay=0.0, block=4",
        "dense_layers=(0,)",
        "1 sparse, 1 dense",
        f"{report.density:.1%} of the pairs in sparse calls",
        f"{report.effective_density:.1%} with dense calls as 100%",
        "mine=1",
        "dense layer: 1 calls",
        report.choice.splitlines()[0],
    ):
        assert expected in text
    assert report.effective_density == pytest.approx((1 + report.density) / 2)
    back = json.loads(json.dumps(report.to_dict()))
    assert back["settings"]["block"] == 4
    assert back["calls"][0]["kernel"] == "mine"
    assert "none yet" in str(session().report())
