"""SpargeAttn's prediction against worked examples and against one block at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falloff import Grid, Plan, Sequence
from falloff.kernels import run
from falloff.methods import Call, Dense, SpargeAttn, State
from falloff.methods.sparge import self_similarity


def tokens(count: int, heads: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, heads, count, 8, dtype=dtype, generator=generator)


def rows(*vectors: list[float]) -> Tensor:
    return torch.tensor(vectors, dtype=torch.float64)[None, None]


E1, E2 = [1.0, 0.0], [0.0, 1.0]


@pytest.mark.parametrize(
    ("block", "similarity"),
    [
        ([E1, E1], 1.0),
        ([E1, E2], 0.5),
        ([E1, [-1.0, 0.0]], 0.0),
        ([E1, E1, E1, [-1.0, 0.0]], 0.25),
        ([[1.0, 0.0], [2.0, 0.0]], 1.0),
        ([E1, [0.0, 0.0]], 0.25),
    ],
)
def test_self_similarity_of_worked_blocks(block: list[list[float]], similarity: float) -> None:
    assert self_similarity(rows(*block), len(block)).item() == pytest.approx(similarity)


def test_self_similarity_is_the_mean_cosine_and_knows_no_length() -> None:
    x = tokens(19)
    cosine = torch.nn.functional.cosine_similarity(x[:, :, :, None], x[:, :, None], dim=-1)
    parts = [cosine[:, :, a : a + 8, a : a + 8].mean((2, 3)) for a in range(0, 19, 8)]
    torch.testing.assert_close(self_similarity(x, 8), torch.stack(parts, -1))
    scaled = x * torch.rand(1, 2, 19, 1, dtype=x.dtype, generator=torch.Generator().manual_seed(1)).add(0.1)
    torch.testing.assert_close(self_similarity(scaled, 8), self_similarity(x, 8))
    half = self_similarity(x.half(), 8)
    torch.testing.assert_close(half.double(), self_similarity(x, 8), atol=2e-3, rtol=0)


MODES = [("topk", 0.4), ("mass_le", 0.6), ("mass_ge", 0.6), ("union", 0.2)]


@pytest.mark.parametrize(("mode", "keep"), MODES)
@pytest.mark.parametrize("theta", [-0.1, 0.15])
def test_the_map_follows_the_rule_one_row_at_a_time(mode: str, keep: float, theta: float) -> None:
    q, k = tokens(43), tokens(43, seed=1)
    made = SpargeAttn(mode=mode, keep=keep, theta=theta, q_block=8, kv_block=4).block_map(q, k)
    smooth = k - k.mean(2, keepdim=True)
    alike_q, alike_k = self_similarity(q, 8) > theta, self_similarity(smooth, 4) > theta
    assert theta < 0 or 0.1 < alike_k.double().mean() < 0.9
    for h in range(2):
        keys = torch.stack([part.mean(0) for part in smooth[0, h].split(4)])
        for i, part in enumerate(q[0, h].split(8)):
            logits = (keys @ part.mean(0) / 8**0.5).masked_fill(~alike_k[0, h], -torch.inf)
            order = sorted(range(11), key=lambda j: -logits[j].item())
            mass = logits.softmax(0)[order].cumsum(0)
            count = {"topk": 4, "mass_le": max(1, int((mass <= 0.6).sum())), "mass_ge": 1 + int((mass < 0.6).sum())}
            count["union"] = max(2, 1 + int((mass < 0.5).sum()))
            on = torch.zeros(11, dtype=torch.bool)
            on[order[: count[mode]]] = True
            assert torch.equal(made[0, h, i], on | ~alike_k[0, h] | ~alike_q[0, h, i]), (h, i)


@pytest.mark.parametrize(("mode", "keep"), MODES)
def test_the_map_does_not_change_with_a_vector_added_to_all_keys(mode: str, keep: float) -> None:
    q, k = tokens(40), tokens(40, seed=1)
    method = SpargeAttn(mode=mode, keep=keep, theta=0.2, q_block=8, kv_block=4)
    assert torch.equal(method.block_map(q, k + 100 * tokens(1, seed=2)), method.block_map(q, k))


def test_shares_of_blocks_are_rounded_down_to_one_at_least() -> None:
    q, k = tokens(45), tokens(45, seed=1)
    for keep, count in ((0.5, 2), (0.1, 1), (1.0, 5)):
        on = SpargeAttn(keep=keep, q_block=9, kv_block=9).block_map(q, k)
        assert bool((on.sum(-1) == count).all())


def test_blocks_of_unlike_tokens_are_computed_throughout() -> None:
    q, k = (tokens(8, seed=seed).repeat_interleave(8, 2) for seed in (0, 1))
    method = SpargeAttn(keep=0.2, theta=0.5, q_block=8, kv_block=8)
    assert bool((method.block_map(q, k).sum(-1) == 1).all())
    signs = torch.tensor([1.0, -1.0]).repeat(4)[:, None]
    q[0, 1, 16:24] *= signs
    k[0, 0, 40:48] *= signs
    on = method.block_map(q, k)
    assert bool(on[0, 1, 2].all())
    assert bool(on[0, 0, :, 5].all())
    assert on.sum((0, 2, 3)).tolist() == [8 + 8, 7 + 8]
    assert method.block_map(q, k - k).all()  # keys all alike have no direction left once their mean is gone


@pytest.mark.parametrize("side", ["after", "before"])
def test_text_is_pinned_and_its_padding_changes_nothing(side: str) -> None:
    sequence = Sequence(Grid(3, 5, 7), 11, side)
    q, k = tokens(116), tokens(116, seed=1)
    method = SpargeAttn(mode="mass_ge", keep=0.5, theta=0.05, q_block=8, kv_block=4)
    made = method.plan(Call(sequence=sequence), q, k, k, State())
    text = slice(0, 11) if side == "before" else slice(105, None)
    q[:, :, text], k[:, :, text] = torch.nan, 1e9
    again = method.plan(Call(sequence=sequence), q, k, k, State())
    assert isinstance(made, Plan)
    assert isinstance(again, Plan)
    assert torch.equal(made.blocks.columns, again.blocks.columns)
    mask = made.mask()
    assert bool(mask[:, :, text].all())
    assert bool(mask[:, :, :, text].all())
    assert made.density < 0.9


def test_what_is_not_finite_stays_dense() -> None:
    q, k = tokens(64), tokens(64, seed=1)
    k[0, 1, 5, 2] = torch.nan
    made = SpargeAttn().plan(Call(sequence=Sequence(Grid(1, 8, 8))), q, k, k, State())
    assert made == Dense("queries or keys are not finite")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mode": "top"}, r"mode = 'top' must be one of topk, mass_le, mass_ge"),
        ({"keep": 0}, r"keep = 0 must be above 0 and at most 1"),
        ({"theta": 1.5}, r"theta = 1.5 is outside -1.0 to 1.0"),
        ({"q_block": 0}, r"q_block = 0 must be a number of tokens"),
        ({"kv_block": 1.5}, r"kv_block = 1.5 must be"),
    ],
)
def test_settings_are_checked(setting: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpargeAttn(**setting)


def test_the_second_stage_is_the_plans_and_leaves_out_more() -> None:
    q, k, v = tokens(100), 3 * tokens(100, seed=1), tokens(100, seed=2)
    call = Call(sequence=Sequence(Grid(4, 5, 5)))
    plans = [SpargeAttn(q_block=4, kv_block=2, skip=skip).plan(call, q, k, v, State()) for skip in (None, 0.0, 40.0)]
    assert [plan.skip for plan in plans] == [None, 0.0, 40.0]
    outs = [run(plan, 4 * q, k, v)[0] for plan in plans]
    assert not torch.allclose(outs[1], outs[0], atol=1e-3)
    torch.testing.assert_close(outs[2], outs[0])


@pytest.mark.parametrize("skip", [-0.1, float("nan"), True])
def test_a_second_stage_that_makes_no_sense_is_refused(skip: float) -> None:
    with pytest.raises(ValueError, match="must be a number of bits of at least 0, or None"):
        SpargeAttn(skip=skip)
