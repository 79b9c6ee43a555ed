"""Decoding with a cache against teacher-forced logits, in float64."""

import pytest
import torch
from decoders import CLASSES, HEIGHT, SIZES, TOKENS, VOCABULARY, WIDTH, model, orders, sample, seed, teacher_forced

from falloff.decoding.cache import Cache
from falloff.decoding.order import make_orders
from falloff.decoding.sampling import Guidance, Sampler
from falloff.decoding.steps import UNKNOWN, decode, step
from falloff.decoding.transformer import NO_CLASS, LPDTransformer

GREEDY = Sampler(temperature=0)
EXACT = {"rtol": 0, "atol": 1e-12}


def cached(
    decoder: LPDTransformer,
    tokens: torch.Tensor,
    labels: torch.Tensor,
    places: torch.Tensor,
    sizes: tuple[int, ...] = SIZES,
    watch: object = None,
) -> torch.Tensor:
    """Logits step by step, of given tokens."""
    cache, placed, before, start, found = Cache(decoder, len(labels), labels.device), tokens.gather(1, places), 0, 0, []
    for number, size in enumerate(sizes):
        end = start + size
        cells = places[:, before:start]
        found.append(
            step(decoder, cache, labels if not number else None, placed[:, before:start], cells, places[:, start:end])
        )
        if callable(watch):
            watch(cache, 1 + start)
        before, start = start, end
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("sizes", [SIZES, (1,) * TOKENS, (1, 14), (1, 6, 1, 7)])
@torch.no_grad()
def test_cached_logits_are_teacher_forced_logits(sizes: tuple[int, ...]) -> None:
    decoder, places = model(), orders(3)
    tokens, labels = sample(3)
    expected = teacher_forced(decoder, tokens, labels, places, sizes)
    torch.testing.assert_close(cached(decoder, tokens, labels, places, sizes), expected, **EXACT)


@torch.no_grad()
def test_queries_never_enter_the_cache() -> None:
    decoder, places = model(), orders(2)
    tokens, labels = sample(2)
    filled = []

    def watch(cache: Cache, end: int) -> None:
        assert cache.filled == end
        assert (cache.keys[:, :, :, :end] != 0).all()
        assert not cache.keys[:, :, :, end:].any()
        assert not cache.values[:, :, :, end:].any()
        filled.append(end)

    cached(decoder, tokens, labels, places, watch=watch)
    assert filled == [1, 2, 4, 7, 11]


@torch.no_grad()
def test_overwriting_queries_in_the_cache_gives_the_same_logits() -> None:
    """As the published code has it: queries are written to the slots that their group's tokens will take."""
    decoder, places = model(), orders(2)
    tokens, labels = sample(2)
    placed, cache, before, start, found = tokens.gather(1, places), Cache(decoder, 2, labels.device), 0, 0, []
    for number, size in enumerate(SIZES):
        end, new = start + size, start - before + (number == 0)
        first = 0 if number == 0 else 1 + before
        context = torch.arange(new + size) < new

        def attend(
            layer: int,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            slots: slice = slice(first, first + new + size),
            seen: int = first + new,
            context: torch.Tensor = context,
        ) -> torch.Tensor:
            cache.keys[layer, :, :, slots], cache.values[layer, :, :, slots] = k, v
            visible = ~context[:, None] | (torch.arange(slots.stop) < seen)
            keys, values = (part[layer, :, :, : slots.stop] for part in (cache.keys, cache.values))
            return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=visible)

        found.append(
            decoder(
                labels if not number else None,
                placed[:, before:start],
                places[:, before:start],
                places[:, start:end],
                attend,
            )
        )
        before, start = start, end
    torch.testing.assert_close(torch.cat(found, dim=1), cached(decoder, tokens, labels, places), **EXACT)


@torch.no_grad()
def test_groups_of_one_are_decoded_as_a_loop_over_whole_prefixes_would() -> None:
    decoder, places = model(), orders(2)
    _, labels = sample(2)
    placed = torch.zeros(2, 0, dtype=torch.int64)
    for n in range(TOKENS):
        # The prefix is causal: row i sees rows up to i, the query last.
        rows = 2 + n
        causal = torch.ones(rows, rows, dtype=torch.bool).tril()

        def attend(
            _: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor = causal
        ) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        logits = decoder(labels, placed, places[:, :n], places[:, n : n + 1], attend)
        placed = torch.cat([placed, logits.argmax(dim=-1)], dim=1)
    expected = torch.empty_like(placed).scatter_(1, places, placed)
    assert torch.equal(decode(decoder, labels, places, (1,) * TOKENS, sampler=GREEDY), expected)


@torch.no_grad()
def test_a_token_changes_later_groups_only() -> None:
    decoder, places = model(), orders(1)
    tokens, labels = sample(1)
    before = teacher_forced(decoder, tokens, labels, places)
    cell = places[0, 4]  # in the third group, places 3 to 5
    tokens[0, cell] = (tokens[0, cell] + 1) % VOCABULARY
    after = teacher_forced(decoder, tokens, labels, places)
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(dim=2).all()


@torch.no_grad()
def test_order_within_a_group_does_not_matter() -> None:
    decoder, places = model(), orders(1)
    tokens, labels = sample(1)
    swapped = places.clone()
    swapped[:, 6:10] = places[:, 6:10].flip(1)
    expected = teacher_forced(decoder, tokens, labels, places)
    expected[:, 6:10] = expected[:, 6:10].flip(1)
    torch.testing.assert_close(teacher_forced(decoder, tokens, labels, swapped), expected, **EXACT)


@torch.no_grad()
def test_queries_of_a_group_see_one_another() -> None:
    """Unlike designs that mask them: the same place gets other logits in other company."""
    decoder, places = model(), orders(1)
    tokens, labels = sample(1)
    alone = teacher_forced(decoder, tokens, labels, places, (1, 1, 13))
    together = teacher_forced(decoder, tokens, labels, places, (1, 2, 12))
    assert torch.equal(alone[:, 0], together[:, 0])
    assert (alone[:, 1] - together[:, 1]).abs().max() > 1e-6


@torch.no_grad()
def test_queries_of_other_groups_change_nothing() -> None:
    decoder, places = model(), orders(1)
    tokens, labels = sample(1)
    expected = teacher_forced(decoder, tokens, labels, places)
    placed = decoder._placed

    def noisy(rows: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = placed(rows, cells)
        if rows is decoder.mask_token:  # queries: all but those of the fourth group, places 6 to 9
            out = out.clone()
            others = torch.cat([torch.arange(6), torch.arange(10, TOKENS)])
            out[:, others] += torch.randn(1, TOKENS - 4, 32, generator=seed(0), dtype=out.dtype)
        return out

    decoder._placed = noisy
    found = teacher_forced(decoder, tokens, labels, places)
    assert torch.equal(found[:, 6:10], expected[:, 6:10])
    assert (found[:, :6] != expected[:, :6]).any()


def test_each_place_is_put_where_its_order_says() -> None:
    """A model that answers with the cell it is asked for draws the grid's numbers, whatever the order."""

    class Echo(LPDTransformer):
        def forward(self, labels_B, tokens_BP, cells_BP, asked_BG, attend):  # type: ignore[no-untyped-def]  # as the module has it
            return torch.nn.functional.one_hot(asked_BG, TOKENS).float()

    echo = Echo(width=8, layers=1, heads=2, grid_height=HEIGHT, grid_width=WIDTH, vocabulary=TOKENS, classes=CLASSES)
    drawn = decode(echo, torch.tensor([0, 1, 2]), orders(3), SIZES, sampler=GREEDY)
    assert torch.equal(drawn, torch.arange(TOKENS).expand(3, -1))


def test_tokens_of_a_group_are_drawn_independently() -> None:
    """What parallel decoding cannot know: of two equal tokens a group of both gets every pair, even by the ideal model,
    and groups of one get equal pairs only.
    """

    class Equal(LPDTransformer):
        """Cell 0 is 0; cells 1 and 2 are both 0 or both 1."""

        def forward(self, labels_B, tokens_BP, cells_BP, asked_BG, attend):  # type: ignore[no-untyped-def]  # as the module has it
            logits = torch.zeros(*asked_BG.shape, 2)
            logits[asked_BG == 0] = torch.tensor([0.0, -torch.inf])
            for image, (tokens, cells) in enumerate(zip(tokens_BP, cells_BP, strict=True)):
                for token in tokens[cells > 0]:
                    logits[image] = torch.where(torch.arange(2) == token, 0.0, -torch.inf)
            return logits

    ideal = Equal(width=8, layers=1, heads=2, grid_height=1, grid_width=3, vocabulary=2, classes=1)
    labels, in_order = torch.zeros(800, dtype=torch.int64), torch.arange(3).expand(800, -1)
    pairs = {}
    for sizes in ((1, 1, 1), (1, 2)):
        drawn = decode(ideal, labels, in_order, sizes, generator=seed(0))
        assert not drawn[:, 0].any()
        pairs[sizes] = torch.bincount(2 * drawn[:, 1] + drawn[:, 2], minlength=4) / 800
    assert pairs[1, 1, 1][1:3].tolist() == [0, 0]
    assert pairs[1, 1, 1][[0, 3]].tolist() == pytest.approx([0.5, 0.5], abs=0.05)
    assert pairs[1, 2].tolist() == pytest.approx([0.25] * 4, abs=0.05)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
@torch.no_grad()
def test_guidance_is_the_formula_on_both_branches(schedule: str) -> None:
    decoder, places = model(), orders(2)
    _, labels = sample(2)
    guidance = Guidance(scale=3.5, schedule=schedule)  # type: ignore[arg-type]  # wrong on purpose
    drawn = decode(decoder, labels, places, SIZES, guidance=guidance, sampler=GREEDY)
    cond = teacher_forced(decoder, drawn, labels, places)
    uncond = teacher_forced(decoder, drawn, torch.full_like(labels, NO_CLASS), places)
    scale = 1 + 2.5 * torch.arange(TOKENS) / TOKENS if schedule == "linear" else torch.full((TOKENS,), 3.5)
    expected = (uncond + scale[:, None] * (cond - uncond)).argmax(dim=-1)
    assert torch.equal(drawn.gather(1, places), expected)
    unguided = decode(decoder, labels, places, SIZES, sampler=GREEDY)
    assert not torch.equal(drawn, unguided)


@torch.no_grad()
def test_a_batch_is_its_images_one_by_one() -> None:
    decoder, places = model(), orders(3)
    labels = torch.tensor([0, 3, 1])
    guidance = Guidance(scale=2.0)
    together = decode(decoder, labels, places, SIZES, guidance=guidance, generator=[seed(i) for i in range(3)])
    for i in range(3):
        alone = decode(decoder, labels[i : i + 1], places[i : i + 1], SIZES, guidance=guidance, generator=[seed(i)])
        assert torch.equal(together[i : i + 1], alone)


@torch.no_grad()
def test_known_tokens_stay_and_are_context_as_in_training() -> None:
    decoder = model()
    tokens, labels = sample(2)
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[0] = mask[1, :3] = True  # eight tokens: the fourth group, places 6 to 9, is known in part
    places = make_orders("locality", HEIGHT, WIDTH, SIZES, 2, seed(4), known_HW=mask)
    known = tokens.masked_fill(~mask.flatten(), UNKNOWN)
    numbers: list[int] = []
    drawn = decode(decoder, labels, places, SIZES, sampler=GREEDY, known_BN=known, on_step=numbers.append)
    assert torch.equal(drawn[:, mask.flatten()], tokens[:, mask.flatten()])
    assert numbers == [0, 1]
    assert int(drawn.min()) >= 0
    logits = teacher_forced(decoder, drawn, labels, places, (1, 2, 3, 2, 2, 5))
    assert torch.equal(drawn.gather(1, places)[:, 8:], logits[:, 8:].argmax(dim=-1))


def test_wrong_arguments_are_refused() -> None:
    decoder, places = model(), orders(2)
    labels = torch.tensor([0, 1])
    with pytest.raises(ValueError, match=r"classes 0 to 3, got \[4, -1\]"):
        decode(decoder, torch.tensor([4, -1]), places, SIZES)
    with pytest.raises(ValueError, match=r"2 labels and 15 tokens need orders \[2, 15\], got \[2, 14\]"):
        decode(decoder, labels, places[:, :14], SIZES)
    with pytest.raises(ValueError, match="each of the cells 0 to 14 once"):
        decode(decoder, labels, torch.zeros_like(places), SIZES)
    with pytest.raises(ValueError, match="first group is one token"):
        decode(decoder, labels, places, (5, 5, 5))
    known = torch.full_like(places, UNKNOWN)
    with pytest.raises(ValueError, match=r"known tokens must be \[2, 15\] as the orders, got \[2, 14\]"):
        decode(decoder, labels, places, SIZES, known_BN=known[:, :14])
    with pytest.raises(ValueError, match="begin with the known cells"):
        decode(decoder, labels, places, SIZES, known_BN=known.scatter(1, places[:, 3:4], 1))
    with pytest.raises(ValueError, match="all 15 tokens are known"):
        decode(decoder, labels, places, SIZES, known_BN=torch.zeros_like(places))
    with pytest.raises(ValueError, match="must be 0 to 10, or -1 where unknown, got 11 to 11"):
        decode(decoder, labels, places, SIZES, known_BN=known.scatter(1, places[:, :1], VOCABULARY))
    with pytest.raises(ValueError, match="guidance scale = -1 is negative"):
        Guidance(scale=-1)
