"""Autocast around a model that falloff is attached to: sparse calls are in the type that dense ones are in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import tiny
import torch
from torch import Tensor

import falloff
from falloff import Plan
from falloff.hosts.autocast import cast
from falloff.methods import Call, State


@dataclass(frozen=True, kw_only=True)
class Told(tiny.Frames):
    """Keeps the types of what it is given."""

    static: ClassVar[bool] = False
    types: ClassVar[set[torch.dtype]] = set()

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        self.types.update(x.dtype for x in (q_BHND, k_BHND, v_BHND))
        return super().plan(call, q_BHND, k_BHND, v_BHND, state)


def test_off_it_changes_nothing_and_on_it_leaves_float64() -> None:
    x, y = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    assert cast(x, y) == (x, y)
    shape = torch.zeros(2, device="meta")
    assert cast(shape) == (shape,)
    with torch.autocast("cpu", torch.bfloat16):
        assert [z.dtype for z in cast(x, y)] == [torch.bfloat16, torch.float64]


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of PyTorch's norm under autocast
@pytest.mark.parametrize("compiled", [False, True])
def test_sparse_calls_of_a_model_are_in_autocasts_type(compiled: bool) -> None:
    torch._dynamo.reset()
    model = tiny.transformer()
    for block in model.blocks:  # as norms of other models do
        block.attn1.norm_q.register_forward_hook(lambda norm, given, out: out.float())
    Told.types.clear()
    falloff.enable(model, Told())
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        run(**tiny.inputs(), return_dict=False)
    assert Told.types == {torch.bfloat16}
