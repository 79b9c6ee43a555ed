"""Contour's look against errors computed token by token, its budget, and its memory of plans."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff import Contour, Grid, Plan, Sequence, attention
from falloff.methods import Call, Dense, State
from falloff.methods.contour import Tiles, best_pairs

SEQUENCE = Sequence(Grid(3, 5, 6), text=4, text_side="before")
TILE = (2, 2, 3)


def qkv(sequence: Sequence = SEQUENCE, heads: int = 2, batch: int = 1, seed: int = 0) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(batch, heads, sequence.tokens, 8, dtype=torch.float64, generator=draw) for _ in range(3)]


def plan(method: Contour, q: Tensor, k: Tensor, v: Tensor, state: State | None = None, **where: int) -> Plan:
    made = method.plan(Call(sequence=SEQUENCE, **where), q, k, v, state or State())
    assert isinstance(made, Plan)
    return made


def spelled_out(q: Tensor, k: Tensor, tokens: list[Tensor]) -> Tensor:
    """E_IJ / n_J of one head, from the definition; all queries of a tile are looked at."""
    scale = q.shape[1] ** -0.5
    lse = (q @ k.mT * scale).logsumexp(1)
    worth = torch.empty(len(tokens), len(tokens), dtype=q.dtype)
    for i, rows in enumerate(tokens):
        for j, keys in enumerate(tokens):
            weight = (q[rows] @ k[keys].mT * scale - lse[rows, None]).exp()
            at_mean = (q[rows] @ k[keys].mean(0) * scale - lse[rows]).exp()
            worth[i, j] = (weight - at_mean[:, None]).square().sum(1).mean() / len(keys)
    return worth


def test_a_look_is_the_error_of_answering_by_means() -> None:
    q, k, _ = qkv()
    grid = SEQUENCE.grid
    tiles = Tiles.of(grid, TILE, q.device)
    tokens = [token[real] for token, real in zip(tiles.token, tiles.real, strict=True)]
    assert torch.equal(torch.cat(tokens).sort().values, torch.arange(grid.tokens))
    assert sorted(map(len, tokens)) == sorted(tiles.sizes.tolist())
    whole = [token for token in tokens if len(token) == 12]
    assert whole  # of these every query is looked at, of smaller tiles some twice
    worth, sizes = Contour(tile=TILE, queries=12)._look(SEQUENCE, TILE, q, k)
    assert torch.equal(sizes, tiles.sizes)
    rows = [i for i, token in enumerate(tokens) if len(token) == 12]
    for head in range(2):
        expected = spelled_out(q[0, head, 4:], k[0, head, 4:], tokens)
        torch.testing.assert_close(worth[0, head, rows], expected[rows])


def test_without_means_the_mass_decides() -> None:
    q, k, _ = qkv()
    worth, sizes = Contour(tile=TILE, queries=12, summary=False)._look(SEQUENCE, TILE, q, k)
    torch.testing.assert_close((worth * sizes).sum(-1), torch.ones_like(worth[..., 0]))


@pytest.mark.parametrize("density", [0.3, 0.5, 1.0])
def test_budget_is_the_layers(density: float) -> None:
    q, k, v = qkv()
    q[:, 0] *= 0.1  # attends broadly: means serve it well
    made = plan(Contour(tile=TILE, density=density), q, k, v)
    blocks = made.blocks.dense()[0]
    assert blocks[:, 0].all()  # text sees all,
    assert blocks[..., 0].all()  # and is seen by all
    assert blocks.diagonal(dim1=1, dim2=2).all()
    broad, sharp = blocks.float().mean((1, 2)).tolist()
    assert broad < sharp or density == 1
    sizes = Tiles.of(SEQUENCE.grid, TILE, q.device).sizes
    pairs = (blocks[:, 1:, 1:] * (sizes[:, None] * sizes)).sum()
    itself = 2 * int(sizes.square().sum())
    assert pairs <= max(density * 2 * int(sizes.sum()) ** 2, itself)


def test_best_pairs_are_the_worthiest_for_their_size() -> None:
    worth = torch.tensor([[[[9.0, 1.0, 3.0], [2.0, 9.0, 0.5], [8.0, 7.0, 9.0]]]])
    sizes = torch.tensor([2, 2, 1])
    # of 25 pairs the diagonal takes 9; then (2, 0) and (2, 1) of two pairs each, and (0, 2) of two
    assert best_pairs(worth, sizes, 13 / 25)[0, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    assert best_pairs(worth, sizes, 15 / 25)[0, 0].int().tolist() == [[1, 0, 1], [0, 1, 0], [1, 1, 1]]
    assert best_pairs(worth, sizes, 0.01)[0, 0].int().tolist() == torch.eye(3, dtype=torch.int32).tolist()


def test_means_come_closer_than_nothing() -> None:
    q, k, v = (x / 2 for x in qkv())
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def error(method: Contour) -> float:
        return float((attention(q, k, v, plan(method, q, k, v)) - dense).norm() / dense.norm())

    assert error(Contour(tile=TILE, density=0.3)) < 0.8 * error(Contour(tile=TILE, density=0.3, summary=False))
    assert error(Contour(tile=TILE, density=1.0)) < 1e-6


def test_plans_serve_until_the_next_look() -> None:
    q, k, v = qkv()
    method, state = Contour(tile=TILE, look_every=3), State()
    first = plan(method, q, k, v, state, step=2, steps=10)
    assert plan(method, k, q, v, state, step=4, steps=10) is first
    assert plan(method, k, q, v, state, step=5, steps=10) is not first


def test_batch_entries_are_on_their_own() -> None:
    q, k, v = qkv(batch=2)
    both = plan(Contour(tile=TILE), q, k, v).blocks.dense()
    for entry in range(2):
        alone = plan(Contour(tile=TILE), *(x[entry : entry + 1] for x in (q, k, v))).blocks.dense()
        assert torch.equal(both[entry : entry + 1], alone)


def test_memory_is_worked_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(batch=2)
    whole = plan(Contour(tile=TILE), q, k, v)
    monkeypatch.setattr("falloff.methods.contour.LOOK_BYTES", 1)
    assert torch.equal(plan(Contour(tile=TILE), q, k, v).blocks.dense(), whole.blocks.dense())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_dense(value: float) -> None:
    q, k, v = qkv()
    k[0, 1, 20, 3] = value
    assert isinstance(Contour(tile=TILE).plan(Call(sequence=SEQUENCE), q, k, v, State()), Dense)


def test_tiles_go_by_the_grid() -> None:
    assert Contour().tile_of(Grid(21, 45, 80)) == (4, 4, 8)
    assert Contour().tile_of(Grid(17, 16, 16)) == (2, 4, 4)
    assert Contour(tile=(1, 2, 3)).tile_of(Grid(17, 16, 16)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 0.0}, "density = 0.0 must be above 0 and at most 1"),
        ({"tile": (1, 2)}, "tile = .* must be three numbers"),
        ({"queries": 0}, "queries = 0 must be a number of queries"),
        ({"look_every": 1.5}, "look_every = 1.5 must be at least 1 step"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Contour(**setting)
