"""SLA2: the exact mixture, its start, its router, and its gradients."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from trained_calls import normal, plan_of, random_classes, run

from falloff import SLA, SLA2, BlockMap, Grid, Plan, Sequence, kernels
from falloff.kernels.linear import PHI, linear_attention
from falloff.methods import Call, State
from falloff.methods.branch import Layer, Work
from falloff.methods.sla2 import Mixed, centred, mix
from falloff.methods.soft_topk import soft_topk


def branch(heads: int = 2, dim: int = 3, features: str = "softmax") -> Mixed:
    made = SLA2(features=features).branch(Layer(heads=heads, head_dim=dim, width=heads * dim))
    assert isinstance(made, Mixed)
    return made


def ragged(seed: int = 0) -> Plan:
    marks = random_classes(seed, 1, 2, 3, 4).clamp(min=0)
    marks[0, 0, 1] = 1
    return plan_of(marks, 10, 10, 4, 3)


def qkv(*, batch: int = 1, tokens: int = 10, dim: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (normal(i, batch, 2, tokens, dim) for i in range(3))
    return q, k, v


def test_the_true_share_and_softmax_over_the_rest_are_full_attention() -> None:
    plan = ragged()
    rest = dataclasses.replace(plan, blocks=BlockMap.from_dense(~plan.blocks.dense()), dropped=None)
    q, k, v = qkv()
    (kept, kept_lse), (others, others_lse) = (kernels.run(part, q, k, v, impl="reference") for part in (plan, rest))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(mix(kept, others, kept_lse - others_lse), dense, rtol=1e-12, atol=1e-12)


def work(plan: Plan, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None) -> Work:
    out = kernels.attend(plan, q, k, v, key_valid=valid, impl="reference")
    return Work(plan=plan, q_BHND=q, k_BHND=k, v_BHND=v, out_BHND=out, scale=3**-0.5, key_valid_BN=valid)


def test_the_share_at_first_is_exact_for_tokens_that_are_their_means() -> None:
    sizes = [4, 4, 2], [3, 3, 3, 1]
    q, k = (
        torch.cat([x[:, :, i : i + 1].expand(-1, -1, n, -1) for i, n in enumerate(lengths)], 2)
        for x, lengths in zip((normal(0, 1, 2, 3, 3), normal(1, 1, 2, 4, 3)), sizes, strict=True)
    )
    plan, v = ragged(), normal(2, 1, 2, 10, 3)
    probabilities = (q @ k.mT / 3**0.5).softmax(-1)
    exact = (probabilities * plan.mask()).sum(-1)[:, :, [0, 4, 8]]
    found = branch().balance(work(plan, q, k, v), k).sigmoid()
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("padded", [False, True])
def test_the_output_is_the_mixture_of_both(padded: bool) -> None:
    plan, made = ragged(), branch()
    with torch.no_grad():
        made.slope.copy_(torch.tensor([0.5, 2.0]))
        made.offset.copy_(torch.tensor([0.3, -0.7]))
    q, k, v = qkv(batch=2)
    valid = torch.ones(2, 10, dtype=torch.bool) if padded else None
    if valid is not None:
        valid[0, 7:], valid[1, 4] = False, False
        k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
    it = work(plan, q, k, v, valid)
    keys = centred(k, valid)
    linear, weight = linear_attention(plan, q, keys, v, features="softmax", over="complement", key_valid=valid)
    logit = made.balance(it, keys) * torch.tensor([[0.5], [2.0]]) + torch.tensor([[0.3], [-0.7]])
    alpha = logit.sigmoid()[:, :, [0] * 4 + [1] * 4 + [2] * 2, None].where(weight[..., None] > 0, torch.tensor(1.0))
    torch.testing.assert_close(made(it), alpha * it.out_BHND + (1 - alpha) * linear)
    assert bool((weight[:, 0, 4:8] == 0).all())  # the row that keeps all


def test_rows_that_keep_all_are_full_attention() -> None:
    plan = plan_of(torch.ones(1, 1, 3, 4, dtype=torch.int64), 10, 10, 4, 3)
    q, k, v = qkv()
    made = branch()
    with torch.no_grad():
        made.slope.zero_()
    torch.testing.assert_close(run(made, plan, q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_a_vector_added_to_all_keys_changes_nothing() -> None:
    method, sequence = SLA2(density=0.3, q_block=16, kv_block=8), Sequence(Grid(1, 8, 8))
    q, k, v = qkv(tokens=64)
    outputs = []
    for keys in (k, k + normal(7, 3)):
        plan = method.plan(Call(sequence=sequence), q, keys, v, State())
        assert isinstance(plan, Plan)
        outputs.append(run(branch(), plan, q, keys, v))
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("features", PHI)
def test_gradients_against_central_differences(features: str) -> None:
    """The estimated share is taken for constant, so that it is held fixed."""
    plan, made = ragged(), branch(features=features).double()
    tensors = [x.requires_grad_() for x in qkv()]
    balance = made.balance(work(plan, *tensors), tensors[1])
    made.balance = lambda *_: balance  # type: ignore[method-assign]

    def call(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        return run(made, plan, q, k, v)

    assert torch.autograd.gradcheck(call, [*tensors, made.slope, made.offset], atol=1e-7)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_gradients_of_large_inputs_in_single_precision(scale: float) -> None:
    plan = plan_of(random_classes(1, 1, 2, 5, 7).clamp(min=0), 70, 90, 16, 13)
    inputs = [scale * normal(i, 1, 2, n, 16) for i, n in enumerate((70, 90, 90))]
    d_out = normal(9, 1, 2, 70, 16)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        made = branch(dim=16).to(dtype)
        q, k, v = (x.to(dtype).requires_grad_() for x in inputs)
        out = run(made, plan, q, k, v, impl="cpu")
        return [x.double() for x in torch.autograd.grad(out, [q, k, v, made.slope, made.offset], d_out.to(dtype))]

    for exact, single in zip(gradients(torch.float64), gradients(torch.float32), strict=True):
        assert (single - exact).norm() <= 1e-4 * exact.norm()


def test_the_router_starts_as_slas_choice_and_can_learn_another() -> None:
    sequence = Sequence(Grid(2, 8, 8), text=5)
    q, k, v = (normal(i, 1, 2, sequence.tokens, 4) for i in range(3))
    settings = {"density": 0.25, "q_block": 16, "kv_block": 8}
    made = branch(dim=4)
    state = State(trained=made)

    def columns(method: SLA | SLA2, state: State) -> Tensor:
        plan = method.plan(Call(sequence=sequence), q, k, v, state)
        assert isinstance(plan, Plan)
        return plan.blocks.columns

    plain = columns(SLA(**settings), State())
    assert torch.equal(columns(SLA2(**settings), State()), plain)
    assert torch.equal(columns(SLA2(**settings), state), plain)
    with torch.no_grad():
        made.router_k.weight.neg_()
    assert not torch.equal(columns(SLA2(**settings), state), plain)


def test_a_gradient_reaches_the_router_through_soft_marks() -> None:
    made = branch(dim=4).double()
    assert not any(router.weight.requires_grad for router in (made.router_q, made.router_k))
    for router in (made.router_q, made.router_k):
        router.requires_grad_(True)
    q, k = normal(0, 1, 2, 5, 4), normal(1, 1, 2, 7, 4)

    def marks(*_: Tensor) -> Tensor:
        return soft_topk(made.route(q, k), 2)

    assert torch.autograd.gradcheck(marks, [made.router_q.weight, made.router_k.weight], atol=1e-6)


def fitted(text: int, router: float = 1.0) -> tuple[Mixed, Work]:
    """A branch that is being fitted, its router larger than the identity, and a call of a grid and text."""
    sequence, method = Sequence(Grid(2, 8, 8), text=text), SLA2(density=0.3, q_block=16, kv_block=8)
    q, k, v = (normal(i, 1, 2, sequence.tokens, 3) for i in range(3))
    made = branch().double()
    made.fitting = True
    for one in (made.router_q, made.router_k):
        one.weight.data.mul_(router)
        one.requires_grad_(True)
    plan = method.plan(Call(sequence=sequence), q, k, v, State(trained=made))
    assert isinstance(plan, Plan)
    return made, dataclasses.replace(work(plan, q, k, v), sequence=sequence)


def test_soft_marks_sum_to_the_number_kept_and_text_is_no_choice() -> None:
    for text in (0, 5):
        made, it = fitted(text)
        shares, kept = made.shares(it, it.k_BHND), it.plan.blocks.dense()
        torch.testing.assert_close(shares.sum(-1), kept.sum(-1).double())
        of_video = shares[:, :, :8, :16]
        assert bool(((of_video > 0) & (of_video < 1)).all())
        assert bool((shares[:, :, 8:] == 1).all())
        assert bool((shares[:, :, :, 16:] == 1).all())
        assert bool(of_video[kept[:, :, :8, :16]].mean() > of_video[~kept[:, :, :8, :16]].mean())


def test_a_call_of_text_alone_has_no_choice() -> None:
    made, it = fitted(5)
    it = dataclasses.replace(it, sequence=Sequence(Grid(1, 1, 4), text=it.plan.q_len - 4))
    assert bool((made.shares(it, it.k_BHND) == 1).all())


@pytest.mark.parametrize("text", [0, 5])
def test_of_clear_scores_the_soft_output_is_the_hard_one(text: int) -> None:
    made, it = fitted(text, router=100.0)
    soft = made(it)
    made.fitting = False
    torch.testing.assert_close(made(it), soft)


def test_the_output_while_it_is_fitted_teaches_the_router() -> None:
    """The estimated share is taken for constant, so that it is held fixed."""
    made, it = fitted(5)
    balance = made.balance(it, centred(it.k_BHND, None), made.shares(it, it.k_BHND).detach())
    made.balance = lambda *_: balance  # type: ignore[method-assign]
    weights = [made.router_q.weight, made.router_k.weight]

    def call(*_: Tensor) -> Tensor:
        return made(it)[:, :, ::29]

    assert torch.autograd.gradcheck(call, weights, atol=1e-6)
    assert all(bool(gradient.any()) for gradient in torch.autograd.grad(made(it).square().sum(), weights))


def test_processes_that_share_the_heads_take_their_own_shares() -> None:
    plan = plan_of(random_classes(0, 1, 1, 3, 4).clamp(min=0), 10, 10, 4, 3)
    made = branch()
    with torch.no_grad():
        made.offset.copy_(torch.tensor([1.0, -2.0]))
    q, k, v = qkv()
    both = made(work(plan, q, k, v))
    second = dataclasses.replace(work(plan, q[:, 1:], k[:, 1:], v[:, 1:]), first_head=1)
    torch.testing.assert_close(made(second), both[:, 1:])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 1.5}, "density = 1.5 must be above 0 and at most 1"),
        ({"features": "hedgehog"}, "features = 'hedgehog' must be one of softmax, elu, relu"),
        ({"q_block": 0}, "q_block = 0 must be a number of tokens of at least 1"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SLA2(**setting)
