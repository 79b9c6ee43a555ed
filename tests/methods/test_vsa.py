"""VSA's selection against one pair of tiles at a time, and the published counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trained_calls import normal

from falloff import Grid, Plan, Sequence, kernels
from falloff.geometry import tile_order
from falloff.methods import VSA, Call, Dense, State
from falloff.methods.branch import Layer, Work
from falloff.methods.pooling import tile_sizes


def qk(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, tokens, 4, dtype=torch.float64, generator=generator).unbind()


def plan(method: VSA, sequence: Sequence, q: Tensor, k: Tensor, state: State | None = None) -> Plan | Dense:
    return method.plan(Call(sequence=sequence), q, k, k, state or State())


@pytest.mark.parametrize(("grid", "tiles"), [((21, 30, 52), 624), ((21, 45, 80), 1440), ((20, 48, 80), 1200)])
def test_published_numbers_of_tiles(grid: tuple[int, int, int], tiles: int) -> None:
    space = Grid(*grid)
    assert len(tile_sizes(space, VSA().tile_of(space))) == tiles


@pytest.mark.parametrize(
    ("sparsity", "tiles", "kept"), [(0.9, 360, 36), (0.9, 361, 37), (0.7, 10, 3), (0.0, 7, 7), (0.999, 20, 1)]
)
def test_kept_tiles_are_rounded_up(sparsity: float, tiles: int, kept: int) -> None:
    assert VSA(sparsity=sparsity).kept(tiles) == kept


@settings(deadline=None, max_examples=40)
@given(
    grid=st.builds(Grid, st.integers(1, 5), st.integers(1, 6), st.integers(1, 7)),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    sparsity=st.sampled_from([0.0, 0.4, 0.8]),
    text=st.integers(0, 5),
    side=st.sampled_from(["after", "before"]),
)
def test_the_map_follows_the_rule_one_row_at_a_time(
    grid: Grid, tile: tuple[int, int, int], sparsity: float, text: int, side: str
) -> None:
    sequence, method = Sequence(grid, text, side), VSA(sparsity=sparsity, tile=tile)
    q, k = qk(sequence.tokens)
    made = plan(method, sequence, q, k)
    assert isinstance(made, Plan)
    mask = made.mask()
    members = tile_order(grid, tile).split(tile_sizes(grid, tile).tolist())
    start = sequence.video_start
    q_means, k_means = (torch.stack([x[:, :, start + m].mean(2) for m in members], 2) for x in (q, k))
    scores = q_means @ k_means.mT
    expected = torch.ones_like(mask)
    for h in range(2):
        for i, rows in enumerate(members):
            best = sorted(range(len(members)), key=lambda j: -scores[0, h, i, j].item())[: method.kept(len(members))]
            seen = torch.zeros(sequence.tokens, dtype=torch.bool)
            for j in best:
                seen[start + members[j]] = True
            seen[: start if side == "before" else 0] = True
            seen[start + grid.tokens :] = True
            expected[0, h, start + rows] = seen
    assert torch.equal(mask, expected)


def test_padding_of_the_text_never_changes_the_map() -> None:
    sequence = Sequence(Grid(5, 6, 7), 9)
    q, k = qk(sequence.tokens)
    made = plan(VSA(), sequence, q, k)
    q[:, :, 210:], k[:, :, 210:] = torch.nan, 1e9
    again = plan(VSA(), sequence, q, k)
    assert torch.equal(made.blocks.columns, again.blocks.columns)
    assert made.density < 0.7


def test_token_order_is_made_once_for_a_sequence() -> None:
    state, sequence = State(), Sequence(Grid(5, 6, 7))
    q, k = qk(210)
    first, second = (plan(VSA(), sequence, x, y, state) for x, y in ((q, k), (k, q)))
    assert first.q_order is second.q_order
    other = Sequence(Grid(6, 5, 7))
    assert torch.equal(plan(VSA(), other, q, k, state).q_order, tile_order(other.grid, (4, 4, 4)))


def test_what_is_not_finite_stays_dense() -> None:
    q, k = qk(64)
    q[0, 1, 5, 2] = torch.inf
    assert plan(VSA(), Sequence(Grid(1, 8, 8)), q, k) == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"sparsity": 1.0}, r"sparsity = 1.0 must be at least 0 and below 1"),
        ({"sparsity": -0.1}, r"sparsity = -0.1 must be"),
        ({"tile": (4, 4)}, r"tile = \(4, 4\) must be three numbers of tokens"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VSA(**setting)


def whole_tiles(grid: Grid, tile: tuple[int, int, int], text: int) -> tuple[Sequence, list[Tensor]]:
    """A sequence with text after it, and the tokens of every tile; text comes in tiles of as many tokens."""
    sequence = Sequence(grid, text)
    sizes = tile_sizes(grid, tile)
    ends = (grid.tokens + torch.arange(text)).split(int(sizes.max())) if text else ()
    return sequence, [*tile_order(grid, tile).split(sizes.tolist()), *ends]


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize("covers_text", [False, True])
def test_the_gated_branch_one_tile_at_a_time(text: int, covers_text: bool) -> None:
    tile = (1, 2, 3)
    sequence, tiles = whole_tiles(Grid(2, 3, 5), tile, text)
    n, shown = sequence.tokens, sequence.tokens if covers_text else sequence.grid.tokens
    method = VSA(gate=True, tile=tile)
    made = method.branch(Layer(heads=2, head_dim=4, width=6, dtype=torch.float64))
    q, k = (torch.cat(2 * [x]) for x in qk(n))
    v, hidden = normal(3, 2, 2, n, 4), normal(4, 2, shown, 6)
    valid = torch.ones(2, n, dtype=torch.bool)
    if text:
        valid[0, -5:], valid[1, -7:] = False, False
        k, v = (x.masked_fill(~valid[:, None, :, None], torch.nan) for x in (k, v))
    kept = normal(5, 2, 2, n, 4)
    made_plan = plan(method, sequence, q, k)
    assert isinstance(made_plan, Plan)
    work = Work(
        plan=made_plan,
        q_BHND=q,
        k_BHND=k,
        v_BHND=v,
        out_BHND=kept,
        scale=0.5,
        key_valid_BN=valid if text else None,
        hidden_BSC=hidden,
        hidden_tokens=None if shown == n else slice(0, shown),
    )
    assert torch.equal(made(work), kept)
    with torch.no_grad():
        made.gate.weight.copy_(normal(6, 8, 6))
        made.gate.bias.copy_(normal(7, 8))
    out = made(work) - kept
    for entry in range(2):
        members = [m[valid[entry, m]] for m in tiles]
        keys = [m for m in members if len(m)]
        for head in range(2):
            k_c, v_c = (torch.stack([x[entry, head, m].mean(0) for m in keys]) for x in (k, v))
            for rows in tiles:
                coarse = (0.5 * k_c @ q[entry, head, rows].mean(0)).softmax(0) @ v_c
                for row in rows:
                    gate = torch.zeros(4, dtype=torch.float64)
                    if row < shown:
                        gate = made.gate(hidden[entry, row]).view(2, 4)[head]
                    torch.testing.assert_close(out[entry, head, row], gate * coarse)


def test_gradients_of_the_gated_branch() -> None:
    sequence = Sequence(Grid(2, 3, 5))
    method = VSA(gate=True, tile=(1, 2, 3))
    made = method.branch(Layer(heads=2, head_dim=3, width=4, dtype=torch.float64))
    with torch.no_grad():
        made.gate.weight.copy_(normal(6, 6, 4))
    q, k, v = (normal(i, 1, 2, 30, 3) for i in range(3))
    made_plan = plan(method, sequence, q, k)
    assert isinstance(made_plan, Plan)

    def call(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, *_: Tensor) -> Tensor:
        out = kernels.attend(made_plan, q, k, v, impl="reference")
        work = Work(plan=made_plan, q_BHND=q, k_BHND=k, v_BHND=v, out_BHND=out, scale=0.5, hidden_BSC=hidden)
        result: Tensor = made(work)
        return result

    inputs = [x.requires_grad_() for x in (q, k, v, normal(4, 1, 30, 4))]
    assert torch.autograd.gradcheck(call, [*inputs, *made.parameters()], atol=1e-7, fast_mode=True)


@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_gradients_of_large_inputs_in_single_precision(scale: float) -> None:
    sequence, method = Sequence(Grid(2, 6, 8)), VSA(gate=True, tile=(1, 2, 4))
    inputs = [scale * normal(i, 1, 2, 96, 16) for i in range(3)]
    hidden, d_out = scale * normal(4, 1, 96, 8), normal(5, 1, 2, 96, 16)
    made_plan = plan(method, sequence, *inputs[:2])
    assert isinstance(made_plan, Plan)

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        made = method.branch(Layer(heads=2, head_dim=16, width=8, dtype=dtype))
        with torch.no_grad():
            made.gate.weight.copy_(normal(6, 32, 8))
        q, k, v, states = (x.to(dtype).requires_grad_() for x in (*inputs, hidden))
        out = kernels.attend(made_plan, q, k, v, impl="cpu")
        work = Work(plan=made_plan, q_BHND=q, k_BHND=k, v_BHND=v, out_BHND=out, scale=0.25, hidden_BSC=states)
        leaves = [q, k, v, states, *made.parameters()]
        return [x.double() for x in torch.autograd.grad(made(work), leaves, d_out.to(dtype))]

    for exact, single in zip(gradients(torch.float64), gradients(torch.float32), strict=True):
        assert (single - exact).norm() <= 1e-4 * exact.norm()


def test_hidden_states_of_other_tokens_are_refused() -> None:
    made = VSA(gate=True).branch(Layer(heads=2, head_dim=4, width=6))
    q = torch.zeros(1, 2, 8, 4)
    made_plan = plan(VSA(), Sequence(Grid(1, 2, 4)), q, q)
    assert isinstance(made_plan, Plan)
    work = Work(plan=made_plan, q_BHND=q, k_BHND=q, v_BHND=q, out_BHND=q, scale=1.0, hidden_BSC=torch.zeros(1, 5, 6))
    with pytest.raises(ValueError, match=r"hidden states \[1, 5, 6\] are neither of the 8 tokens of the call nor"):
        made(work)


def test_without_its_gate_it_learns_nothing() -> None:
    assert not VSA().learns
    assert VSA(gate=True).learns
