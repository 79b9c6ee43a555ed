"""XAttention against the published example, the true antidiagonals, and maps that must not depend on chance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff import Grid, Plan, Sequence
from falloff.methods import Call, Dense, State, XAttention, xattention
from falloff.methods.select import mass_ge
from falloff.methods.xattention import antidiagonal_mass


def qk(tokens: int, heads: int = 2, batch: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, batch, heads, tokens, 4, dtype=torch.float64, generator=generator).mul(2).unbind()


def plan(method: XAttention, sequence: Sequence, q: Tensor, k: Tensor) -> Plan | Dense:
    return method.plan(Call(sequence=sequence), q, k, k, State())


def test_published_example() -> None:
    q, k = (torch.tensor(x, dtype=torch.float64).view(1, 1, 4, 1) for x in ([1, 2, 3, 4], [1, 0, 1, 1]))
    mass = antidiagonal_mass(q, k, stride=2, block=2)[0, 0]
    expected = torch.tensor([[0.3775, 0.6225], [0.1824, 0.8176]], dtype=torch.float64)
    torch.testing.assert_close(mass, expected, atol=5e-5, rtol=0)
    assert mass_ge(mass, 0.8).tolist() == [[True, True], [False, True]]  # the first block is forced by nothing


def antidiagonal(logits: Tensor, a: int, b: int) -> Tensor:
    """Its mean in the square of 4 x 4 logits at (a, b)."""
    return sum(logits[..., a + 3 - s, b + s] for s in range(4)) / 4


@pytest.mark.parametrize("tokens", [24, 21])
def test_scores_are_the_means_of_antidiagonals(tokens: int) -> None:
    stride, block = 4, 8
    q, k = qk(tokens)
    logits = q @ k.mT / 2
    starts = [min(start, tokens - stride) for start in range(0, tokens, stride)]
    weights = torch.tensor([min(stride, tokens - start) / stride for start in range(0, tokens, stride)])
    z = torch.stack([torch.stack([antidiagonal(logits, a, b) for b in starts], -1) for a in starts], -2)
    p = (z + weights.log()).softmax(-1) * weights[:, None]
    parts = [row.split(block // stride, 3) for row in p.split(block // stride, 2)]
    expected = torch.stack([torch.stack([tile.sum((2, 3)) for tile in row], -1) for row in parts], -2)
    torch.testing.assert_close(antidiagonal_mass(q, k, stride, block), expected)


def test_equal_tokens_of_a_block_give_its_true_mass() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(2, 1, 2, 5, 4, dtype=torch.float64, generator=generator).repeat_interleave(8, 3)[:, :, :, :37]
    true = (q @ k.mT / 2).softmax(-1)
    expected = torch.stack([part.sum(-1) for part in true.split(8, 3)], -1)
    expected = torch.stack([part.sum(-2) for part in expected.split(8, 2)], -2)
    torch.testing.assert_close(4 * antidiagonal_mass(q, k, 4, 8), expected)


def test_scores_made_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk(100)
    whole = antidiagonal_mass(q, k, 4, 16)
    monkeypatch.setattr(xattention, "SCORES", 1)
    torch.testing.assert_close(antidiagonal_mass(q, k, 4, 16), whole)


@pytest.mark.parametrize("side", ["after", "before"])
def test_padding_of_the_text_never_changes_the_map(side: str) -> None:
    sequence = Sequence(Grid(3, 5, 7), 11, side)
    q, k = qk(sequence.tokens)
    made = plan(XAttention(tau=0.5, block=8, stride=4), sequence, q, k)
    text = slice(0, 11) if side == "before" else slice(105, None)
    q[:, :, text], k[:, :, text] = torch.nan, 1e9
    again = plan(XAttention(tau=0.5, block=8, stride=4), sequence, q, k)
    assert torch.equal(made.blocks.columns, again.blocks.columns)
    mask = made.mask()
    assert bool(mask[:, :, text].all())
    assert bool(mask[:, :, :, text].all())
    assert 0.2 < made.density < 0.9


def test_every_head_may_have_its_own_share() -> None:
    sequence = Sequence(Grid(2, 8, 8))
    q, k = qk(128)
    both = plan(XAttention(tau=(0.3, 1.0), block=8), sequence, q, k).blocks.dense()
    assert torch.equal(both[:, :1], plan(XAttention(tau=0.3, block=8), sequence, q, k).blocks.dense()[:, :1])
    assert both[0, 1].all()
    second = XAttention(tau=(0.3, 1.0), block=8).plan(
        Call(sequence=sequence, first_head=1), q[:, 1:], k[:, 1:], q, State()
    )
    assert isinstance(second, Plan)
    assert torch.equal(second.blocks.dense(), both[:, 1:])
    with pytest.raises(ValueError, match="tau has 3 shares for 2 heads"):
        plan(XAttention(tau=(0.3, 0.4, 0.5)), sequence, q, k)


@pytest.mark.parametrize("side", ["q", "k"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_dense(side: str, value: float) -> None:
    q, k = qk(64)
    (q if side == "q" else k)[0, 1, 5, 2] = value
    assert plan(XAttention(block=8), Sequence(Grid(1, 8, 8)), q, k) == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tau": 0.0}, r"tau = 0.0 must be above 0 and at most 1"),
        ({"tau": (0.5, 1.5)}, r"tau = 1.5 must be"),
        ({"stride": 0}, r"stride = 0 must be a number of tokens"),
        ({"stride": 7}, r"stride = 7 must divide the block of 128"),
        ({"block": 0}, r"block = 0 must be a number of tokens"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        XAttention(**setting)
