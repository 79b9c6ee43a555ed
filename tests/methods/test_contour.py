"""Contour's look against errors computed key by key, its budget, and its memory of plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff import Contour, Grid, Plan, Sequence, attention
from falloff.methods import SVG2, Call, Dense, State
from falloff.methods.contour import best_pairs, spared, spread

SEQUENCE = Sequence(Grid(3, 5, 6), text=4, text_side="before")
SMALL = {"q_tokens": 15, "k_tokens": 6, "queries": 6}


def qkv(heads: int = 2, batch: int = 1, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, heads, SEQUENCE.tokens, 8, dtype=torch.float64, generator=draw) for _ in range(3)]


def plan(method: Contour, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, **where: int) -> Plan:
    made = method.plan(Call(sequence=SEQUENCE, **where), q, k, v, state or State())
    assert isinstance(made, Plan)
    return made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # written out in PyTorch, and in C++
def test_a_look_is_the_error_of_answering_by_means(dtype: torch.dtype) -> None:
    q, k, _ = (x.to(dtype) for x in qkv(batch=2))
    sizes = torch.tensor([[[30, 0, 1, 63], [10, 20, 30, 34]]]).expand(2, 2, 4)
    looked = q[:, :, :12]
    shuffled = torch.stack([torch.stack([torch.randperm(k.shape[2]) for _ in row]) for row in k])
    keys, order = k.gather(2, shuffled[..., None].expand_as(k)), shuffled.argsort(-1)
    worth = spared(looked, keys, order, sizes, per_cluster=4)
    assert worth.shape == (2, 2, 3, 4)
    for entry in range(2):
        for head in range(2):
            logits = looked[entry, head] @ k[entry, head].mT * 8**-0.5
            weights, lse = logits.softmax(1), logits.logsumexp(1, keepdim=True)
            start = 0
            for cluster, size in enumerate(sizes[entry, head].tolist()):
                keys = slice(start, start + size)
                start += size
                if not size:
                    assert (worth[entry, head, :, cluster] == 0).all()
                    continue
                mean = k[entry, head, keys].mean(0)
                at_mean = (looked[entry, head] @ mean[:, None] * 8**-0.5 - lse).exp()
                error = (weights[:, keys] - at_mean).square().sum(1).view(3, 4).mean(1)
                rounding = 1e-4 if dtype == torch.float32 else 1e-9
                torch.testing.assert_close(worth[entry, head, :, cluster], error / size, rtol=rounding, atol=1e-9)


def test_looked_at_tokens_are_their_clusters_own() -> None:
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0)).view(1, 1, 20)
    sizes = torch.tensor([[[9, 1, 0, 10]]])
    chosen = spread(order, sizes, 3).view(4, 3)
    assert set(chosen[0].tolist()) <= set(order[0, 0, :9].tolist())
    assert len(set(chosen[0].tolist())) == 3
    assert chosen[1].tolist() == [int(order[0, 0, 9])] * 3
    assert set(chosen[3].tolist()) <= set(order[0, 0, 10:].tolist())


def test_best_pairs_are_the_worthiest_of_all_heads() -> None:
    worth = torch.tensor([[[[9.0, 1.0], [2.0, 3.0]], [[8.0, 7.0], [0.1, 0.2]]]])
    q_sizes, k_sizes = torch.tensor([[[2, 3], [4, 1]]]), torch.tensor([[[4, 1], [2, 3]]])
    # a row's best: pairs of 2 * 4, 3 * 1, 4 * 2 and 1 * 3; next 7.0 with 4 * 3, then 2.0 with 3 * 4
    least = [[[True, False], [False, True]], [[True, False], [False, True]]]
    assert best_pairs(worth, q_sizes, k_sizes, 0.01)[0].tolist() == least
    least[1][0][1] = True
    assert best_pairs(worth, q_sizes, k_sizes, (22 + 12) / 50)[0].tolist() == least
    least[0][1][0] = True
    assert best_pairs(worth, q_sizes, k_sizes, (22 + 24) / 50)[0].tolist() == least


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_budget_is_the_layers(density: float) -> None:
    q, k, v = qkv()
    q[:, 0] *= 0.1  # attends broadly: means serve it well
    made = plan(Contour(density=density, **SMALL), q, k, v)
    mask = made.mask()[0]
    assert mask[:, :4].all()  # text sees all,
    assert mask[..., :4].all()  # and is seen by all
    video = mask[:, 4:, 4:].double().mean((1, 2))
    assert float(video.mean()) <= density + 0.02  # a row's best may exceed it
    assert video[0] < video[1] or density == 1
    assert made.summary


def test_nearer_to_dense_than_routing_by_centroids_at_no_more_density() -> None:
    draw = torch.Generator().manual_seed(3)
    centers = 3 * torch.randn(1, 4, 6, 8, dtype=torch.float64, generator=draw)
    member = torch.randint(6, (1, 4, SEQUENCE.tokens, 1), generator=draw).expand(-1, -1, -1, 8)
    q, k = (centers.gather(2, member) + torch.randn(*member.shape, dtype=torch.float64, generator=draw) for _ in "qk")
    v = torch.randn(*member.shape, dtype=torch.float64, generator=draw)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    other = SVG2(q_clusters=6, k_clusters=15, mass=0.7, summary=True).plan(Call(sequence=SEQUENCE), q, k, v, State())
    assert isinstance(other, Plan)
    video = float(other.mask()[..., 4:, 4:].double().mean())
    ours = plan(Contour(density=video, **SMALL), q, k, v)
    assert ours.density <= other.density + 1e-9

    def error(made: Plan) -> float:
        return float((attention(q, k, v, made) - dense).norm() / dense.norm())

    assert error(ours) < error(other)
    assert error(plan(Contour(density=1.0, **SMALL), q, k, v)) < 1e-12


def test_plans_serve_until_the_next_look() -> None:
    q, k, v = qkv()
    method, state = Contour(look_every=3, **SMALL), State()
    first = plan(method, q, k, v, state, step=2, steps=10)
    assert plan(method, k, q, v, state, step=4, steps=10) is first
    assert plan(method, k, q, v, state, step=5, steps=10) is not first


def test_batch_entries_are_on_their_own() -> None:
    q, k, v = qkv(batch=2)
    both = plan(Contour(**SMALL), q, k, v).mask()
    for entry in range(2):
        alone = plan(Contour(**SMALL), *(x[entry : entry + 1] for x in (q, k, v))).mask()
        assert torch.equal(both[entry : entry + 1], alone)


def test_memory_is_worked_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(batch=2)
    whole = plan(Contour(**SMALL), q, k, v)
    monkeypatch.setattr("falloff.methods.contour.LOOK_BYTES", 1)
    assert torch.equal(plan(Contour(**SMALL), q, k, v).mask(), whole.mask())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_dense(value: float) -> None:
    q, k, v = qkv()
    k[0, 1, 20, 3] = value
    assert isinstance(Contour(**SMALL).plan(Call(sequence=SEQUENCE), q, k, v, State()), Dense)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 0.0}, "density = 0.0 must be above 0 and at most 1"),
        ({"q_tokens": 0}, "q_tokens = 0 must be a number of tokens"),
        ({"queries": 0}, "queries = 0 must be a number of queries"),
        ({"look_every": 1.5}, "look_every = 1.5 must be at least 1 step"),
        ({"seed": -1}, "seed = -1 must be a whole number"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contour(**setting)
