"""PBS against the published order, and against one row at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff import Grid, Plan, Sequence
from falloff.methods import PBS, Call, Dense, State, pbs
from falloff.methods.pbs import importance, sort_in_segments


def qk(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, 2, tokens, 4, dtype=torch.float64, generator=generator).mul(2).unbind()


def plan(method: PBS, sequence: Sequence, q: Tensor, k: Tensor) -> Plan | Dense:
    return method.plan(Call(sequence=sequence), q, k, k, State())


def test_published_order() -> None:
    weights = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.5, 0.1])[None, None]
    assert sort_in_segments(weights, 4)[0, 0].tolist() == [1, 3, 2, 0, 4, 5]
    assert sort_in_segments(weights, 99)[0, 0].tolist() == [4, 1, 3, 2, 0, 5]
    assert sort_in_segments(torch.zeros(1, 1, 5), 3)[0, 0].tolist() == [0, 1, 2, 3, 4]


def test_importance_is_the_attention_of_the_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk(30)
    probabilities = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(importance(q, k, 99), probabilities.mean(2))
    expected = probabilities[:, :, [5, 15, 25]].mean(2)
    torch.testing.assert_close(importance(q, k, 3), expected)
    monkeypatch.setattr(pbs, "SCORES", 1)
    torch.testing.assert_close(importance(q, k, 3), expected)


@pytest.mark.parametrize(("segment", "tokens"), [("video", 42), ("frame", 14), (5, 5)])
def test_the_map_follows_the_rule_one_row_at_a_time(segment: str | int, tokens: int) -> None:
    sequence, method = Sequence(Grid(3, 2, 7)), PBS(tau=0.7, segment=segment, proxies=6, block=4)
    q, k = qk(42)
    mask = plan(method, sequence, q, k).mask()
    weights = importance(q, k, 6)
    for h in range(2):
        order = []
        for start in range(0, 42, tokens):
            order += sorted(range(start, min(start + tokens, 42)), key=lambda j: -weights[0, h, j].item())
        blocks = torch.tensor(order).split(4)
        means = torch.stack([k[0, h, block].mean(0) for block in blocks])
        for i, part in enumerate(q[0, h].split(4)):
            mass = (means @ part.mean(0) / 2).softmax(0)
            seen, total = torch.zeros(42, dtype=torch.bool), 0.0
            for j in sorted(range(len(blocks)), key=lambda j: -mass[j].item()):
                if total < 0.7:
                    seen[blocks[j]] = True
                total += mass[j].item()
            assert torch.equal(mask[0, h, 4 * i], seen), (h, i)


def test_keeping_everything_is_reached() -> None:
    q, k = qk(64)
    assert plan(PBS(tau=1.0, block=8), Sequence(Grid(1, 8, 8)), q, k).density == 1


def test_heavy_keys_that_lie_scattered_cost_fewer_blocks_once_they_are_sorted() -> None:
    q, k = qk(512)
    heavy = torch.randperm(512, generator=torch.Generator().manual_seed(1))[:16]
    q, k = q * 0.1, k * 0.1
    q[..., 0] += 4
    k[:, :, heavy, 0] += 4
    sequence = Sequence(Grid(1, 16, 32))
    made = plan(PBS(tau=0.6, block=16), sequence, q, k)
    probabilities = (q @ k.mT / 2).softmax(-1)
    assert made.density < 0.1
    assert float((probabilities * made.mask()).sum(-1).mean()) > 0.9
    in_place = plan(PBS(tau=0.6, block=16, segment=1), sequence, q, k)
    assert in_place.density > 3 * made.density


@pytest.mark.parametrize("side", ["after", "before"])
def test_text_is_pinned_and_its_padding_changes_nothing(side: str) -> None:
    sequence = Sequence(Grid(3, 5, 7), 11, side)
    q, k = qk(116)
    made = plan(PBS(tau=0.5, block=8), sequence, q, k)
    text = slice(0, 11) if side == "before" else slice(105, None)
    q[:, :, text], k[:, :, text] = torch.nan, 1e9
    again = plan(PBS(tau=0.5, block=8), sequence, q, k)
    assert torch.equal(made.blocks.columns, again.blocks.columns)
    assert torch.equal(made.kv_order, again.kv_order)
    mask = made.mask()
    assert bool(mask[:, :, text].all())
    assert bool(mask[:, :, :, text].all())
    assert made.density < 0.9


def test_what_is_not_finite_stays_dense() -> None:
    q, k = qk(64)
    q[0, 1, 5, 2] = torch.inf
    assert plan(PBS(), Sequence(Grid(1, 8, 8)), q, k) == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"tau": 0.0}, r"tau = 0.0 must be above 0 and at most 1"),
        ({"segment": "clip"}, r"segment = 'clip' must be \"video\", \"frame\" or a number of tokens"),
        ({"segment": 0}, r"segment = 0 must be"),
        ({"proxies": 0}, r"proxies = 0 must be a number of queries"),
        ({"block": 0}, r"block = 0 must be a number of tokens"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PBS(**setting)
