"""PyTorch's attention under a plan, for models that are not diffusers'."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import falloff
from falloff.methods import Call, Dense, Method, State

GRID = (3, 4, 5)


class Foreign(nn.Module):
    """Two layers of self-attention over 60 tokens, then cross-attention to 7, as a repository might write them."""

    def forward(self, x_BHND: Tensor, text_BHND: Tensor, **more: Any) -> Tensor:
        for _ in range(2):
            x_BHND = x_BHND + F.scaled_dot_product_attention(x_BHND, x_BHND, x_BHND, **more)
        return F.scaled_dot_product_attention(x_BHND, text_BHND, text_BHND)


def inputs(tokens: int = 60, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, tokens, 16, generator=generator), torch.randn(batch, 2, 7, 16, generator=generator)


def test_self_attention_is_masked_and_the_rest_left_alone() -> None:
    model, method = Foreign(), tiny.Frames()
    plain = model(*inputs())
    with falloff.sdpa(method, grid=GRID) as calls:
        sparse = model(*inputs())
    mask = falloff.plan_for(method, falloff.Sequence(falloff.Grid(*GRID))).mask()
    torch.testing.assert_close(sparse, model(*inputs(), attn_mask=mask))
    assert (sparse - plain).abs().max() > 1e-3
    assert (calls.sparse, dict(calls.dense)) == (2, {"60 queries and 7 keys": 1})
    assert calls.density == pytest.approx(5 / 9)
    assert "2 calls at 55.6% of the pairs" in str(calls)
    assert torch.equal(model(*inputs()), plain)


def test_plan_text_scale_and_mask_over_keys() -> None:
    plan = falloff.plan_for(tiny.Frames(), falloff.Sequence(falloff.Grid(*GRID), 4, "before"))
    model = Foreign()
    valid = torch.ones(2, 1, 1, 64, dtype=torch.bool)
    valid[1, ..., :3] = False
    more = {"scale": 0.5, "attn_mask": valid}
    with falloff.sdpa(plan) as calls:
        given = model(*inputs(64), **more)
    with falloff.sdpa(tiny.Frames(), grid=falloff.Grid(*GRID), text=4, text_side="before", kernel="cpu"):
        made = model(*inputs(64), **more)
    expected = model(*inputs(64), scale=0.5, attn_mask=valid & plan.mask())
    torch.testing.assert_close(given, expected)
    torch.testing.assert_close(made, expected)
    assert calls.sparse == 2


def test_other_kinds_of_attention_stay_dense_with_a_reason() -> None:
    x, text = inputs()
    plain = F.scaled_dot_product_attention(x, x, x, is_causal=True)
    with falloff.sdpa(tiny.Frames(), grid=GRID) as calls:
        assert torch.equal(F.scaled_dot_product_attention(x, x, x, is_causal=True), plain)
        F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(60, 60))
        F.scaled_dot_product_attention(x[0], x[0], x[0])
        Foreign()(x, text)
    assert calls.sparse == 2
    told = " | ".join(calls.dense)
    for reason in ("causal", "torch.float32 of shape (60, 60)", "3 dimensions", "60 queries and 7 keys"):
        assert reason in told


def test_block_without_a_fitting_call_warns() -> None:
    x, text = inputs(59)
    with pytest.warns(UserWarning, match="plan of 60 tokens; seen: 59 queries and 59 keys"):
        run_sparse(x, text)


def run_sparse(x: Tensor, text: Tensor) -> Tensor:
    with falloff.sdpa(tiny.Frames(), grid=GRID):
        return Foreign()(x, text)


def test_gradients_flow() -> None:
    x, text = inputs()
    x.requires_grad_()
    with falloff.sdpa(tiny.Frames(seen=9), grid=GRID, kernel="cpu"):
        Foreign()(x, text).square().sum().backward()
    sparse, x.grad = x.grad, None
    Foreign()(x, text).square().sum().backward()
    torch.testing.assert_close(sparse, x.grad, atol=1e-5, rtol=1e-4)


def test_other_threads_are_left_alone() -> None:
    x, text = inputs()
    plain = Foreign()(x, text)
    outs: list[Tensor] = []
    with falloff.sdpa(tiny.Frames(), grid=GRID):
        thread = threading.Thread(target=lambda: outs.append(Foreign()(x, text)))
        thread.start()
        thread.join()
        Foreign()(x, text)
    assert torch.equal(outs[0], plain)


def test_error_inside_passes_through_and_leaves_nothing() -> None:
    x, text = inputs()
    plain = Foreign()(x, text)
    with pytest.raises(KeyError), falloff.sdpa(tiny.Frames(), grid=GRID):
        raise KeyError
    assert torch.equal(Foreign()(x, text), plain)


@dataclass(frozen=True, kw_only=True)
class Looking(Method):
    name: ClassVar[str] = "looking"

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Dense:
        return Dense("no")


@pytest.mark.parametrize(
    ("what", "more", "error", "message"),
    [
        ("radial", {}, TypeError, "expected a Plan or a Method, got str"),
        (falloff.Radial(), {}, ValueError, "radial needs grid="),
        (Looking(), {"grid": GRID}, ValueError, "looking plans from queries and keys"),
        (falloff.Full(), {"grid": GRID}, ValueError, "dense has no plan for"),
        (falloff.Radial(), {"grid": (0, 4, 5)}, ValueError, "at least one token per axis"),
    ],
)
def test_bad_input_is_told(what: Any, more: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message), falloff.sdpa(what, **more):
        pass


def test_plan_with_a_grid_is_told() -> None:
    plan = falloff.plan_for(tiny.Frames(), falloff.Sequence(falloff.Grid(*GRID)))
    with pytest.raises(ValueError, match="a plan knows its tokens already"), falloff.sdpa(plan, grid=GRID):
        pass


@pytest.mark.parametrize("value", [torch.float32, torch.bfloat16])
def test_under_autocast_it_computes_in_the_type_that_pytorch_would(value: torch.dtype) -> None:
    """Norms leave queries and keys in float32 there, where projections leave values in bfloat16."""
    (q, _), v = inputs(), inputs()[0].to(value)
    with falloff.sdpa(tiny.Frames(seen=3), grid=GRID) as calls, torch.autocast("cpu", torch.bfloat16):
        out, double = F.scaled_dot_product_attention(q, q, v), F.scaled_dot_product_attention(*[q.double()] * 3)
    assert calls.sparse == 2
    with torch.autocast("cpu", torch.bfloat16):
        expected = F.scaled_dot_product_attention(q, q, v)
    assert out.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0.02, atol=0.02)
    assert double.dtype == torch.float64
