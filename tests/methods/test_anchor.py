"""AnchorAttention against its definition, one group and one key at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from falloff import Grid, Plan, Sequence
from falloff.kernels import run
from falloff.methods import Anchor, Call, Dense, State, anchor


def qk(tokens: int, seed: int = 0, heads: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, heads, tokens, 4, dtype=torch.float64, generator=generator).mul(2).unbind()


def plan(method: Anchor, sequence: Sequence, q: Tensor, k: Tensor) -> Plan | Dense:
    return method.plan(Call(sequence=sequence), q, k, k, State())


def definition(method: Anchor, sequence: Sequence, q: Tensor, k: Tensor) -> Tensor:
    """Of one head, bool [N, N]."""
    tokens, start, group = sequence.tokens, sequence.video_start, method.block * method.step
    video = range(start, start + sequence.grid.tokens)
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    logits = q @ k.T / 2
    for first in range(0, tokens, group):
        members = list(range(first, min(first + group, tokens)))
        if any(i not in video for i in members):
            continue
        seen = {*members, *list(video)[: method.initial]}
        for at in range(0, len(members), method.block):
            block = members[at : at + method.block]
            bar = logits[block][:, sorted({*members, *list(video)[: method.initial]})].amax(1).mean()
            mean = q[block].mean(0) @ k.T / 2
            seen |= {j for j in video if mean[j] + method.theta >= bar}
        for i in members:
            mask[i, [j for j in video if j not in seen]] = False
    return mask


@settings(deadline=None, max_examples=40)
@given(
    video=st.integers(1, 60),
    text=st.sampled_from([0, 0, 3, 9]),
    side=st.sampled_from(["after", "before"]),
    block=st.integers(1, 5),
    step=st.integers(1, 3),
    initial=st.integers(1, 9),
    theta=st.sampled_from([0.0, 0.5, 2.0]),
)
def test_the_plan_is_the_definition(
    video: int, text: int, side: str, block: int, step: int, initial: int, theta: float
) -> None:
    sequence = Sequence(Grid(1, 1, video), text, side)
    method = Anchor(theta=theta, block=block, step=step, initial=initial)
    q, k = qk(sequence.tokens, heads=1)
    assert torch.equal(plan(method, sequence, q, k).mask()[0, 0], definition(method, sequence, q[0, 0], k[0, 0]))


def test_keys_found_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = qk(60)
    sequence, method = Sequence(Grid(1, 6, 10)), Anchor(theta=1.0, block=4, step=2, initial=5)
    whole = plan(method, sequence, q, k)
    assert whole.density < 0.8
    monkeypatch.setattr(anchor, "SCORES", 1)
    assert torch.equal(plan(method, sequence, q, k).blocks.columns, whole.blocks.columns)


def test_a_plan_of_single_keys_runs() -> None:
    sequence = Sequence(Grid(3, 4, 5), 4)
    q, k = qk(64)
    made = plan(Anchor(theta=0.5, block=4, step=2, initial=5), sequence, q, k)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, k, attn_mask=made.mask())
    torch.testing.assert_close(run(made, q, k, k, impl="cpu")[0], out)


@pytest.mark.parametrize("side", ["after", "before"])
def test_padding_of_the_text_changes_nothing(side: str) -> None:
    sequence, method = Sequence(Grid(3, 5, 7), 11, side), Anchor(theta=0.5, block=4, step=2, initial=5)
    q, k = qk(116)
    made = plan(method, sequence, q, k)
    text = slice(0, 11) if side == "before" else slice(105, None)
    q[:, :, text], k[:, :, text] = torch.nan, 1e9
    assert torch.equal(plan(method, sequence, q, k).mask(), made.mask())
    assert made.density < 0.8


def test_a_wider_margin_keeps_more_until_it_keeps_all() -> None:
    q, k = qk(60)
    sequence = Sequence(Grid(1, 6, 10))
    plans = [plan(Anchor(theta=theta, block=4, step=2, initial=5), sequence, q, k) for theta in (0, 1, 2, 99)]
    densities = [made.density for made in plans]
    assert densities == sorted(set(densities))
    assert densities[-1] == 1


def test_what_is_not_finite_stays_dense() -> None:
    q, k = qk(64)
    k[0, 1, 5, 2] = torch.nan
    assert plan(Anchor(), Sequence(Grid(1, 8, 8)), q, k) == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"theta": -1.0}, r"theta = -1.0 must be finite and at least 0"),
        ({"theta": float("nan")}, r"theta = nan must be"),
        ({"step": 0}, r"step = 0 must be a number of blocks"),
        ({"block": 0}, r"block = 0 must be a number of tokens"),
        ({"initial": 0}, r"initial = 0 must be a number of tokens"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Anchor(**setting)
