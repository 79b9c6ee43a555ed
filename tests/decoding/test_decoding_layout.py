"""The training mask: published counts, and what each row may see."""

import pytest
import torch

from falloff.decoding import layout
from falloff.decoding.layout import attending, dense_mask, flex_mask, group_ids, visible_pairs
from falloff.decoding.sizes import group_sizes


@pytest.mark.parametrize(
    ("tokens", "steps", "rows", "pairs"),
    [
        (256, 256, 512, 66048),
        (256, 32, 501, 65455),
        (256, 20, 493, 64969),
        (256, 8, 463, 63551),
        (1024, 48, 2015, 1042733),
        (1024, 1024, 2048, 1050624),
    ],
)
def test_rows_and_pairs_of_published_groups(tokens: int, steps: int, rows: int, pairs: int) -> None:
    sizes = group_sizes(tokens, steps)
    assert 2 * tokens + 1 - sizes[-1] == rows
    assert visible_pairs(sizes) == pairs


def test_every_query_sees_what_was_before_and_its_group() -> None:
    sizes = group_sizes(256, 20)
    seen = dense_mask(group_ids([sizes], 256), 257)[0, 0, 257:].sum(dim=1).tolist()
    before = [1 + sum(sizes[:k]) for k in range(len(sizes))]
    assert seen == [end + size for end, size in zip(before, sizes, strict=True) for _ in range(size)]


def test_groups_of_one_make_the_context_causal() -> None:
    mask = dense_mask(group_ids([(1,) * 9], 9), 10)[0, 0]
    assert torch.equal(mask[:10, :10], torch.ones(10, 10, dtype=torch.bool).tril())


def test_mask_holds_the_counted_pairs() -> None:
    sizes = (1, 2, 3, 4, 6)
    mask = dense_mask(group_ids([sizes], 16), 17)[0, 0]
    needed = torch.ones(33, dtype=torch.bool)
    needed[11:17] = False  # the last group's context
    assert visible_pairs(sizes) == 253
    assert int(mask[needed][:, needed].sum()) == 253
    assert not mask[needed][:, ~needed].any()


def test_each_row_sees_what_it_may() -> None:
    mask = dense_mask(group_ids([(1, 2, 1)], 4), 5)[0, 0].int().tolist()
    #       class, context 1 2 2 3, queries 1 2 2 3
    assert mask == [
        [1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0],
        [1, 1, 0, 0, 0, 0, 1, 1, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 1],
    ]


def test_every_sample_has_its_own_groups() -> None:
    ids = group_ids([(1, 3), (1, 1, 2)], 4)
    both = dense_mask(ids, 5)
    for i, sizes in enumerate([(1, 3), (1, 1, 2)]):
        assert torch.equal(both[i], dense_mask(group_ids([sizes], 4), 5)[0])


def test_blocks_for_flex_attention_mean_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.flex_attention import create_mask

    ids = group_ids([group_sizes(36, 6), group_sizes(36, 36)], 36)
    blocks = flex_mask(ids, 37)
    expected = dense_mask(ids, 37)
    assert torch.equal(create_mask(blocks.mask_mod, 2, 1, 73, 73, device="cpu"), expected)
    called = []

    def compiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_mask: object) -> torch.Tensor:
        called.append(block_mask)
        return v

    monkeypatch.setattr(layout, "_compiled_flex", lambda: compiled)
    q, k, v = torch.randn(3, 2, 1, 73, 8, generator=torch.Generator().manual_seed(0)).unbind()
    assert attending(blocks)(0, q, k, v) is v
    assert called == [blocks]


def test_groups_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="decodes 4 tokens, the group sizes sum to 5"):
        group_ids([(1, 4)], 4)
