"""Which blocks text pins, and which tokens a predictor sees."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from falloff import Grid, Plan, Sequence
from falloff.kernels.groups import WORKING_BYTES
from falloff.methods import layout
from falloff.methods.layout import Prediction, UniformBlocks, finite, predicted


@settings(deadline=None, max_examples=150)
@given(
    video=st.integers(1, 30),
    text=st.integers(0, 20),
    side=st.sampled_from(["after", "before"]),
    q_block=st.integers(1, 12),
    kv_block=st.integers(1, 12),
)
def test_a_predictor_sees_video_alone_and_decides_on_all_of_it(
    video: int, text: int, side: str, q_block: int, kv_block: int
) -> None:
    sequence = Sequence(Grid(1, 1, video), text, side)
    is_text = torch.ones(sequence.tokens, dtype=torch.bool)
    is_text[sequence.video_start : sequence.video_start + video] = False
    x = torch.arange(sequence.tokens, dtype=torch.float32).view(1, 1, -1, 1)
    asked = []

    def first_block(q: torch.Tensor, k: torch.Tensor, _: slice) -> Prediction:
        asked.append((q.flatten().long(), k.flatten().long()))
        q_blocks, kv_blocks = -(-q.shape[2] // q_block), -(-k.shape[2] // kv_block)
        on = (torch.arange(kv_blocks) == 0).expand(1, 1, q_blocks, -1)
        return Prediction(on, kv_order=torch.arange(k.shape[2]).flip(0)[None, None])

    made = predicted(sequence, q_block, kv_block, x, x, first_block)
    assert isinstance(made, Plan)

    def touched(block: int) -> torch.Tensor:
        """Tokens in blocks with text, one at a time."""
        parts = is_text.split(block)
        return torch.cat([part.any().expand(len(part)) for part in parts])

    q_pinned, kv_pinned = touched(q_block), touched(kv_block)
    mask = made.mask()[0, 0]
    assert bool(mask[q_pinned].all())
    assert bool(mask[:, kv_pinned].all())
    if asked:
        assert torch.equal(asked[0][0], (~q_pinned).nonzero()[:, 0])
        assert torch.equal(asked[0][1], (~kv_pinned).nonzero()[:, 0])
        seen = mask[~q_pinned][:, ~kv_pinned]
        last = min(kv_block, seen.shape[1])  # the first block of the reversed keys
        assert bool(seen[:, seen.shape[1] - last :].all())
        assert not bool(seen[:, : seen.shape[1] - last].any())
    else:
        assert bool(q_pinned.all() | kv_pinned.all())


def test_blocks_before_and_after_count_up() -> None:
    assert UniformBlocks(Sequence(Grid(1, 1, 20), 5, "after"), 8).pinned == (0, 2)
    assert UniformBlocks(Sequence(Grid(1, 1, 20), 5, "before"), 8).pinned == (1, 0)
    assert UniformBlocks(Sequence(Grid(1, 1, 20)), 8).tokens == slice(0, 20)
    assert UniformBlocks(Sequence(Grid(1, 1, 4), 5), 8).pinned == (2, 0)


def test_finite_sees_every_number() -> None:
    x = torch.ones(2, 3, 2, 3, dtype=torch.float16)
    assert finite(x, 65504 * x)  # whose sum float16 does not hold
    for value in (torch.nan, torch.inf, -torch.inf):
        for place in (0, 17, 35):
            y = x.clone()
            y.view(-1)[place] = value
            assert not finite(x, y)
    assert not finite(torch.tensor([torch.inf, -torch.inf]).expand(1, 1, 1, 2))


def test_heads_are_looked_at_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sequence = Sequence(Grid(1, 1, 12))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 2, 5, 12, 4, generator=generator)
    asked = []

    def above(q: torch.Tensor, k: torch.Tensor, some: slice) -> Prediction:
        asked.append((len(q), some.stop - some.start))
        assert torch.equal(k[0], all_keys[len(asked) - 1])
        order = k[..., 0].argsort(dim=-1)
        scores = (q @ k.mT)[:, :, ::4, ::4]
        return Prediction(scores >= scores.amax(-1, keepdim=True), kv_order=order)

    all_keys = [k[0], k[1]]
    together = predicted(sequence, 4, 4, q, k, above)
    assert asked == [(1, 5), (1, 5)]
    asked.clear()
    monkeypatch.setattr(layout, "COPIES", WORKING_BYTES // (4 * 4 * 24 * 2))  # two heads fit
    all_keys = [x[h] for x in k for h in (slice(0, 2), slice(2, 4), slice(4, 5))]
    apart = predicted(sequence, 4, 4, q, k, above)
    assert asked == [(1, 2), (1, 2), (1, 1)] * 2
    assert isinstance(together, Plan)
    assert isinstance(apart, Plan)
    assert torch.equal(together.mask(), apart.mask())
    assert together.kv_order is not None
    assert apart.kv_order is not None
    assert torch.equal(together.kv_order, apart.kv_order)
