import pytest
import torch

from falloff.evaluation.probe import Probe
from falloff.evaluation.recall import RecallObserver, kept_mass
from falloff.geometry import Grid, Sequence
from falloff.methods import Full, Radial, State
from falloff.methods.base import Call, plan_for
from falloff.plan import BlockMap, Plan

SEQUENCE = Sequence(Grid(5, 4, 6), text=7, text_side="after")


def qk(tokens: int, heads: int = 3, batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(batch, heads, tokens, 8, generator=draw) for _ in range(2))
    return q, k


def per_head_plan(tokens: int) -> Plan:
    """Orders, sizes and maps of their own for three heads."""
    draw = torch.Generator().manual_seed(1)
    orders = [torch.stack([torch.randperm(tokens, generator=draw) for _ in range(3)])[None] for _ in range(2)]
    sizes = torch.tensor([[5, 0, tokens - 9, 4], [tokens - 3, 1, 1, 1], [1, tokens - 7, 2, 4]])[None]
    blocks = (torch.rand(1, 3, 4, 4, generator=draw) < 0.5) | torch.eye(4, dtype=torch.bool)
    blocks[0, 0, 1, 2] = True
    return Plan(
        q_len=tokens,
        kv_len=tokens,
        q_sizes=sizes,
        kv_sizes=sizes,
        q_order=orders[0],
        kv_order=orders[1],
        blocks=BlockMap.from_dense(blocks),
    )


def test_kept_mass_is_the_softmax_on_the_mask() -> None:
    q, k = qk(31)
    plan = per_head_plan(31)
    rows = torch.tensor([30, 0, 7, 7])
    expected = ((q @ k.mT * 8**-0.5).softmax(-1) * plan.mask())[:, :, rows].sum(-1).mean()
    (share,) = kept_mass(q[:, :, rows], k, [plan.keys_seen(rows)])
    assert share == pytest.approx(float(expected), rel=1e-5)


def test_keys_seen_are_rows_of_the_mask() -> None:
    plan = per_head_plan(31)
    rows = torch.tensor([3, 30, 0])
    assert torch.equal(plan.keys_seen(rows), plan.mask()[:, :, rows])


def test_methods_are_judged_side_by_side() -> None:
    q, k = qk(SEQUENCE.tokens)
    wide, narrow = Radial(block=2), Radial(block=2, decay=0.0, sink_frames=0, neighbour="decayed")
    observer = RecallObserver(methods=(wide, Full(), narrow), queries=32)
    probe = Probe(observers=(observer,), steps=1)
    state = State()
    for layer in range(2):
        probe.plan(Call(sequence=SEQUENCE, layer=layer, layers=2, step=0, steps=1), q, k, k, state)
    first, full, last = observer.found
    assert full.mean() is None  # it plans nothing
    assert last.mean() is not None
    assert first.mean() is not None
    assert first.mean() > last.mean()
    assert set(last.by_layer()) == {0, 1}
    density = plan_for(narrow, SEQUENCE).density
    assert last.density_by_layer() == pytest.approx({0: density, 1: density})
    assert last.mean() == pytest.approx(density, abs=0.1)  # random queries attend evenly
