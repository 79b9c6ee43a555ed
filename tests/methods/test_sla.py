"""SLA against hand-made numbers, one query at a time, and central differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trained_calls import normal, plan_of, random_classes, run, token_classes

from falloff import SLA, BlockMap, Grid, Plan, Sequence, kernels
from falloff.kernels.linear import PHI, linear_attention
from falloff.methods import Call, State
from falloff.methods.branch import Layer
from falloff.methods.sla import Projected, classes, share_of
from falloff.plan import PlanError

OVERS = ("marginal", "complement", "all")
SIZES = [4, 4, 2], [3, 3, 3, 1]
"""Of 10 queries and 10 keys."""


def branch(over: str = "marginal", features: str = "softmax", dim: int = 3, seed: int | None = 0) -> Projected:
    made = SLA(linear_over=over, features=features).branch(Layer(heads=2, head_dim=dim, width=2 * dim))
    if seed is not None:
        with torch.no_grad():
            for number, parameter in enumerate(made.parameters()):
                parameter.copy_(normal(seed + number, *parameter.shape))
    return made


def ragged(seed: int = 0, heads: int = 2) -> tuple[Plan, Tensor]:
    marks = random_classes(seed, 1, heads, 3, 4)
    marks[0, 0, 1] = 1  # a row without a marginal block
    marks[..., 2, 1:3] = 0  # one with two, in every head
    return plan_of(marks, 10, 10, 4, 3), marks


@pytest.mark.parametrize(("over", "linear"), [("marginal", 5.0), ("complement", 14 / 3), ("all", 15 / (4 + 1e-5))])
def test_numbers_by_hand(over: str, linear: float) -> None:
    plan = plan_of(torch.tensor([[1, 0, -1, 0]]), 4, 4, 4, 1)
    zero, v = torch.zeros(1, 1, 4, 1, dtype=torch.float64), torch.tensor([1.0, 2, 4, 8]).double().view(1, 1, 4, 1)
    made = branch(over, dim=1)
    w, b = made.proj.weight.item(), made.proj.bias.item()
    torch.testing.assert_close(run(made, plan, zero, zero, v), torch.full_like(v, 1 + linear * w + b))


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    over=st.sampled_from(OVERS),
    features=st.sampled_from(list(PHI)),
    sizes=st.sampled_from([(4, 3), (SIZES[0], SIZES[1]), ([0, 7, 3], [2, 0, 5, 3])]),
    ordered=st.booleans(),
    padded=st.booleans(),
)
def test_the_linear_part_one_query_at_a_time(
    seed: int,
    over: str,
    features: str,
    sizes: tuple[Any, Any],
    ordered: bool,
    padded: bool,
) -> None:
    marks = random_classes(seed, 2, 2, 3, 4)
    lists = SIZES if isinstance(sizes[0], int) else sizes
    q_sizes, kv_sizes = (size if isinstance(size, int) else torch.tensor(size) for size in sizes)
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.rand(2, 2, 10, generator=generator).argsort(-1) if ordered else None for _ in "qk"]
    plan = Plan(
        q_len=10,
        kv_len=10,
        q_sizes=q_sizes,
        kv_sizes=kv_sizes,
        blocks=BlockMap.from_dense(marks == 1),
        dropped=BlockMap.from_dense(marks == -1),
        q_order=orders[0],
        kv_order=orders[1],
        partial=True,
    )
    q, k, v = (normal(seed + i, 2, 2, 10, 3) for i in range(3))
    valid = torch.rand(2, 10, generator=generator) < 0.7 if padded else None
    if valid is not None:
        k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
    out, weight = linear_attention(plan, q, k, v, features=features, over=over, key_valid=valid)
    wanted = {"marginal": (0,), "complement": (0, -1), "all": (1, 0, -1)}[over]
    seen = torch.isin(token_classes(marks, *lists), torch.tensor(wanted))
    for entry in range(2):
        for head in range(2):
            for i in range(10):
                row = i if orders[0] is None else int(orders[0][entry, head, i])
                keys = seen[entry, head, i].nonzero()[:, 0]
                keys = keys if orders[1] is None else orders[1][entry, head, keys]
                keys = keys if valid is None else keys[valid[entry, keys]]
                x, y = (PHI[features](t) for t in (q[entry, head, row], k[entry, head, keys]))
                shares = y @ x
                expected = shares @ v[entry, head, keys] / (shares.sum() + (1e-5 if over == "all" else 0))
                expected = expected if shares.sum() > 0 else torch.zeros(3, dtype=torch.float64)
                torch.testing.assert_close(out[entry, head, row], expected, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(weight[entry, head, row], shares.sum(), rtol=1e-12, atol=1e-12)


def test_blocks_may_have_shares_in_the_sums() -> None:
    plan, marks = ragged()
    q, k, v = (normal(i, 1, 2, 10, 3) for i in range(3))
    features = "softmax"
    of_zero_and_one = linear_attention(plan, q, k, v, features=features, over=(marks != 1).double())
    for found, wanted in zip(
        of_zero_and_one, linear_attention(plan, q, k, v, features=features, over="complement"), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    shares = normal(7, 1, 2, 3, 4).sigmoid().requires_grad_()

    def call(shares: Tensor) -> tuple[Tensor, Tensor]:
        return linear_attention(plan, q, k, v, features=features, over=shares)

    assert torch.autograd.gradcheck(call, shares, atol=1e-7)


@pytest.mark.parametrize("features", PHI)
@pytest.mark.parametrize("over", OVERS)
def test_gradients_against_central_differences(over: str, features: str) -> None:
    plan, _ = ragged()
    made = branch(over, features).double()
    tensors = [normal(i, 1, 2, 10, 3).requires_grad_() for i in range(3)]

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return run(made, plan, q, k, v)

    assert torch.autograd.gradcheck(call, [*tensors, *made.parameters()], atol=1e-7)


@pytest.mark.parametrize("over", OVERS)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_gradients_of_large_inputs_in_single_precision(over: str, scale: float) -> None:
    marks = random_classes(1, 1, 2, 5, 7)
    plan = plan_of(marks, 70, 90, 16, 13)
    inputs = [scale * normal(i, 1, 2, n, 16) for i, n in enumerate((70, 90, 90))]
    d_out = normal(9, 1, 2, 70, 16)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        made = branch(over, dim=16).to(dtype)
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = run(made, plan, q, k, v, impl="cpu")
        return [x.double() for x in torch.autograd.grad(out, [q, k, v, *made.parameters()], d_out.to(dtype))]

    for exact, single in zip(gradients(torch.float64), gradients(torch.float32), strict=True):
        assert (single - exact).norm() <= 1e-4 * exact.norm()


@pytest.mark.parametrize("over", ["marginal", "complement"])
def test_nothing_left_over_is_plain_attention(over: str) -> None:
    plan = plan_of(torch.ones(1, 1, 3, 4, dtype=torch.int64), 10, 10, 4, 3)
    q, k, v = (normal(i, 1, 2, 10, 3).requires_grad_() for i in range(3))
    out, weight = linear_attention(plan, q, k, v, features="softmax", over=over)
    assert not out.any()
    assert not weight.any()
    assert not any(x.any() for x in torch.autograd.grad(out.sum(), (q, k, v)))
    made = branch(over)
    with torch.no_grad():
        made.proj.bias.zero_()
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(run(made, plan, q, k, v), dense)


@pytest.mark.parametrize("over", OVERS)
def test_nothing_critical_is_linear_attention(over: str) -> None:
    plan = plan_of(torch.zeros(1, 1, 3, 4, dtype=torch.int64), 10, 10, 4, 3)
    q, k, v = (normal(i, 1, 2, 10, 3) for i in range(3))
    weights = PHI["softmax"](q) @ PHI["softmax"](k).mT
    out, _ = linear_attention(plan, q, k, v, features="softmax", over=over)
    torch.testing.assert_close(out, weights @ v / weights.sum(-1, keepdim=True), rtol=1e-4, atol=1e-4)
    made = branch(over)
    projected = torch.nn.functional.linear(out, made.proj.weight.double(), made.proj.bias.double())
    torch.testing.assert_close(run(made, plan, q, k, v), projected)  # of no key, softmax attention is 0


def test_dropped_keys_have_no_gradient() -> None:
    marks = torch.tensor([[1, 0, -1, 0]] * 3)
    plan = plan_of(marks, 10, 10, 4, 3)
    q, k, v = (normal(i, 1, 2, 10, 3).requires_grad_() for i in range(3))
    dk, dv = torch.autograd.grad(run(branch(), plan, q, k, v).square().sum(), (k, v))
    for gradient in (dk, dv):
        assert not gradient[:, :, 6:9].any()
        assert gradient[:, :, :6].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_untrained_it_is_its_sparse_part(dtype: torch.dtype) -> None:
    plan, _ = ragged()
    q, k, v = (normal(i, 1, 2, 10, 3, dtype=dtype) for i in range(3))
    for over in OVERS:
        assert torch.equal(run(branch(over, seed=None), plan, q, k, v), kernels.attend(plan, q, k, v, impl="reference"))


@pytest.mark.parametrize("over", ["marginal", "complement"])
def test_the_linear_part_is_a_mean_of_its_values(over: str) -> None:
    marks = random_classes(3, 1, 2, 3, 4)
    marks[..., 1] = 0
    plan = plan_of(marks, 10, 10, 4, 3)
    q, k, v = (5 * normal(i, 1, 2, 10, 3) for i in range(3))
    out, weight = linear_attention(plan, q, k, v, features="softmax", over=over)
    assert (weight > 0).all()
    seen = (token_classes(marks, *SIZES) != 1) if over == "complement" else (token_classes(marks, *SIZES) == 0)
    for sign in (1, -1):
        least = (sign * v[:, :, None]).masked_fill(~seen[..., None], torch.inf).amin(3)
        assert (sign * out >= least - 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_totals_less_the_rest_are_the_sums(dtype: torch.dtype) -> None:
    """What the paper's kernels compute, over all keys less the listed ones, is what we sum directly."""
    plan, marks = ragged(heads=1)
    q, k, v = (normal(i, 1, 1, 10, 3, dtype=dtype).double() for i in range(3))
    x, y = q.softmax(-1), k.softmax(-1)
    listed = (token_classes(marks, *SIZES) != 0).double()
    pairs = x @ y.mT
    total, rest = pairs @ v, (pairs * listed) @ v
    weight = pairs.sum(-1) - (pairs * listed).sum(-1)
    given = [t.to(dtype) for t in (q, k, v)]
    out, found = linear_attention(plan, *given, features="softmax", over="marginal")
    assert (found > 0.5).any()
    torch.testing.assert_close(found.double(), weight, rtol=1e-4, atol=1e-5)
    rounding = 1e-4 if dtype == torch.float32 else 2**-8  # of out, once: sums and states are float32
    torch.testing.assert_close(out.double() * weight[..., None], total - rest, rtol=rounding, atol=1e-5)


def test_keys_are_not_smoothed_for_the_linear_part() -> None:
    sequence, method = Sequence(Grid(1, 8, 8)), SLA(density=0.2, negligible=0.3, q_block=16, kv_block=8)
    q, k, v = (normal(i, 1, 2, 64, 4) for i in range(3))
    shifted = k + normal(7, 4)
    plans = [method.plan(Call(sequence=sequence), q, keys, v, State()) for keys in (k, shifted)]
    assert all(isinstance(plan, Plan) for plan in plans)
    for name in ("blocks", "dropped"):
        assert torch.equal(getattr(plans[0], name).columns, getattr(plans[1], name).columns)
    sparse = [kernels.attend(plans[0], q, keys, v) for keys in (k, shifted)]
    torch.testing.assert_close(*sparse)
    made = branch(dim=4)
    linear = [run(made, plans[0], q, keys, v) - out for keys, out in zip((k, shifted), sparse, strict=True)]
    assert not torch.allclose(*linear, rtol=1e-2)


@settings(deadline=None, max_examples=40)
@given(
    blocks=st.integers(1, 30),
    density=st.sampled_from([0.01, 0.05, 0.3, 0.7, 1.0]),
    negligible=st.sampled_from([0.0, 0.1, 0.5, 0.99]),
)
def test_classes_of_a_row(blocks: int, density: float, negligible: float) -> None:
    scores = normal(blocks, 2, 3, blocks)
    critical, least = classes(scores, density, negligible)
    count = max(1, round(density * blocks - 0.5 + 1e-6))
    assert (critical.sum(-1) == count).all()
    assert (least.sum(-1) == min(round(negligible * blocks - 0.5 + 1e-6), blocks - count)).all()
    assert not (critical & least).any()
    middle = ~critical & ~least
    low = scores.masked_fill(~critical, torch.inf).amin(-1)
    assert (scores.masked_fill(~middle & ~least, -torch.inf).amax(-1) <= low).all()
    high = scores.masked_fill(~least, -torch.inf).amax(-1)
    assert (scores.masked_fill(~middle & ~critical, torch.inf).amin(-1) >= high).all()


def test_equal_blocks_are_of_one_class_each() -> None:
    critical, least = classes(torch.zeros(1, 4), 0.5, 0.5)
    assert critical.tolist() == [[True, True, False, False]]
    assert least.tolist() == [[False, False, True, True]]


def test_published_counts() -> None:
    assert share_of(512, 0.05) == 25
    assert share_of(10, 0.3) == 3
    assert share_of(9, 0.1) == 0


@settings(deadline=None, max_examples=30)
@given(
    grid=st.builds(Grid, st.integers(1, 4), st.integers(1, 6), st.integers(1, 7)),
    text=st.integers(0, 20),
    side=st.sampled_from(["after", "before"]),
)
def test_text_is_critical_throughout(grid: Grid, text: int, side: str) -> None:
    sequence = Sequence(grid, text, side)
    method = SLA(density=0.2, negligible=0.4, q_block=8, kv_block=6)
    q, k = (normal(i, 1, 2, sequence.tokens, 4) for i in range(2))
    plan = method.plan(Call(sequence=sequence), q, k, k, State())
    assert isinstance(plan, Plan)
    mask = plan.mask()
    is_text = torch.ones(sequence.tokens, dtype=torch.bool)
    is_text[sequence.video_start : sequence.video_start + grid.tokens] = False
    assert mask[:, :, is_text].all()
    assert mask[..., is_text].all()
    if plan.dropped is None:  # every block has text
        assert plan.density == 1
    else:
        dropped = plan_of(-plan.dropped.dense().long() + 1, *2 * [sequence.tokens], 8, 6).mask().logical_not()
        assert not dropped[:, :, is_text].any()
        assert not dropped[..., is_text].any()
        assert not (dropped & mask).any()


def test_only_marginal_drops() -> None:
    q = normal(0, 1, 2, 64, 4)
    for over in OVERS:
        method = SLA(linear_over=over, negligible=0.4, q_block=16, kv_block=8)
        plan = method.plan(Call(sequence=Sequence(Grid(1, 8, 8))), q, q, q, State())
        assert isinstance(plan, Plan)
        assert (plan.dropped is not None) is (over == "marginal")


def test_a_dropped_block_is_not_computed() -> None:
    on = BlockMap.from_dense(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(PlanError, match="a dropped block is computed as well"):
        Plan(q_len=4, kv_len=4, q_sizes=2, kv_sizes=2, blocks=on, dropped=on)
    other = BlockMap.from_dense(torch.zeros(2, 3, dtype=torch.bool))
    with pytest.raises(PlanError, match=r"dropped must have the shape of blocks, \(1, 1, 2, 2\), got \(1, 1, 2, 3\)"):
        Plan(q_len=4, kv_len=4, q_sizes=2, kv_sizes=2, blocks=on, dropped=other)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 0.0}, "density = 0.0 must be above 0 and at most 1"),
        ({"negligible": 1.0}, "negligible = 1.0 must be at least 0 and below 1"),
        ({"linear_over": "none"}, "linear_over = 'none' must be one of marginal, complement, all"),
        ({"features": "hedgehog"}, "features = 'hedgehog' must be one of softmax, elu, relu"),
        ({"kv_block": 0}, "kv_block = 0 must be a number of tokens of at least 1"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLA(**setting)
