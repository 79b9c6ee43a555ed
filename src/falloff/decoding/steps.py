"""Decoding an image's tokens group by group, one forward pass each.

The pass of group k encodes the tokens of group k - 1 into the cache and asks for those of group k. Queries attend to
the cache and to one another and never enter it: two dense attention calls, no mask. The last group is not encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from falloff.decoding.cache import Cache
from falloff.decoding.layout import dense_mask
from falloff.decoding.sampling import Generators, Guidance, Sampler, guided
from falloff.decoding.sizes import check_sizes
from falloff.decoding.static import StaticSteps
from falloff.decoding.transformer import NO_CLASS, LPDTransformer

OnStep = Callable[[int], None]
UNKNOWN = -1
"""A token to be decoded, among known ones."""


def step(
    model: LPDTransformer,
    cache: Cache,
    labels_B: Tensor | None,
    tokens_BP: Tensor,
    cells_BP: Tensor,
    asked_BG: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """Encode the class, where labels are given, and tokens into the cache; return logits of the cells asked for.

    ``mask``, boolean [P', P']: which of the new context rows see which; without it all see all.
    """
    new = tokens_BP.shape[1] + (labels_B is not None)
    start, end = cache.filled, cache.filled + new
    if mask is not None:
        mask = torch.cat([mask.new_ones(new, start), mask], dim=1)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.keys[layer, :, :, start:end] = k[:, :, :new]
        cache.values[layer, :, :, start:end] = v[:, :, :new]
        keys, values = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
        context = sdpa(q[:, :, :new], keys, values, attn_mask=mask)
        seen, shown = torch.cat([keys, k[:, :, new:]], dim=2), torch.cat([values, v[:, :, new:]], dim=2)
        return torch.cat([context, sdpa(q[:, :, new:], seen, shown)], dim=2)

    logits: Tensor = model(labels_B, tokens_BP, cells_BP, asked_BG, attend)
    cache.filled = end
    return logits


@torch.no_grad()
def decode(
    model: LPDTransformer,
    labels_B: Tensor,
    orders_BN: Tensor,
    sizes: Sequence[int],
    *,
    guidance: Guidance | None = None,
    sampler: Sampler | None = None,
    generator: Generators = None,
    known_BN: Tensor | None = None,
    on_step: OnStep | None = None,
    compiled: StaticSteps | None = None,
) -> Tensor:
    """Tokens of one image per label, int64 [B, N] in raster order.

    ``orders_BN``: a decoding order for each image. ``sizes``: tokens per group, the same for all.
    ``known_BN``: tokens that are given, ``UNKNOWN`` elsewhere; each order must begin with the known cells, and the
    groups they fill are passed over. ``on_step`` is told the number of each group that was decoded, from 0.
    ``compiled``: the model's steps in one shape; without them every step has its own. All is computed on the labels'
    device.
    Raises ``ValueError`` for labels, orders, sizes or known tokens that do not fit.
    """
    guidance, sampler = guidance or Guidance(), sampler or Sampler()
    model.check_labels(labels_B)
    check_sizes(sizes, model.tokens)
    _check_orders(orders_BN, len(labels_B), model.tokens)
    orders_BN = orders_BN.to(labels_B.device)
    known = _known_places(known_BN, orders_BN, model.config.vocabulary)
    done = known.shape[1]

    placed = torch.zeros_like(orders_BN)
    placed[:, :done] = known
    copies = 1 if guidance.scale == 1 else 2
    scales = guidance.scales(model.tokens).to(labels_B.device)
    classes = labels_B if copies == 1 else torch.cat([labels_B, torch.full_like(labels_B, NO_CLASS)])
    batch_on = (len(classes), labels_B.device)
    cache = Cache(model, *batch_on) if compiled is None else compiled.begin(*batch_on)
    begun, mask = 0, _known_mask(sizes, done).to(labels_B.device) if done else None
    for number, end in enumerate(end for end in accumulate(sizes) if end > done):
        tokens = placed[:, begun:done].repeat(copies, 1)
        cells, asked = (orders_BN[:, a:b].repeat(copies, 1) for a, b in ((begun, done), (done, end)))
        if compiled is None or mask is not None:
            logits = step(model, cache, classes if number == 0 else None, tokens, cells, asked, mask)
        else:
            logits = compiled(cache, classes, tokens, cells, asked, max(sizes))
        if copies == 2:
            cond, uncond = logits.chunk(2)
            logits = guided(cond, uncond, scales[done:end])
        placed[:, done:end] = sampler(logits, generator)
        begun, done, mask = done, end, None
        if on_step is not None:
            on_step(number)
    return torch.empty_like(placed).scatter_(1, orders_BN, placed)


def _known_mask(sizes: Sequence[int], known: int) -> Tensor:
    """Who of the class and the known tokens sees whom, [1 + known, 1 + known]: in groups, as in training."""
    group = torch.arange(1, len(sizes) + 1).repeat_interleave(torch.tensor(list(sizes)))[:known]
    ids = torch.cat([torch.zeros(1, dtype=torch.int64), group])
    return dense_mask(ids[None], 1 + known)[0, 0]


def _check_orders(orders_BN: Tensor, batch: int, tokens: int) -> None:
    if tuple(orders_BN.shape) != (batch, tokens):
        raise ValueError(
            f"{batch} labels and {tokens} tokens need orders [{batch}, {tokens}], got {list(orders_BN.shape)}"
        )
    cells = torch.arange(tokens, device=orders_BN.device)
    if not torch.equal(orders_BN.sort(dim=1).values, cells.expand_as(orders_BN)):
        raise ValueError(f"an order must name each of the cells 0 to {tokens - 1} once")


def _known_places(known_BN: Tensor | None, orders_BN: Tensor, vocabulary: int) -> Tensor:
    """The known tokens as the first places of the orders, [B, M]."""
    if known_BN is None:
        return orders_BN[:, :0]
    if known_BN.shape != orders_BN.shape:
        raise ValueError(f"known tokens must be {list(orders_BN.shape)} as the orders, got {list(known_BN.shape)}")
    placed = known_BN.to(orders_BN.device).gather(1, orders_BN)
    given = placed != UNKNOWN
    count = int(given[0].sum())
    if not bool(given[:, :count].all()) or bool(given[:, count:].any()):
        raise ValueError(f"each order must begin with the known cells, equally many ({count}) in each image")
    if count == orders_BN.shape[1]:
        raise ValueError(f"all {count} tokens are known; there is nothing to decode")
    known = placed[:, :count]
    if count and not 0 <= int(known.min()) <= int(known.max()) < vocabulary:
        raise ValueError(
            f"known tokens must be 0 to {vocabulary - 1}, or {UNKNOWN} where unknown, "
            f"got {int(known.min())} to {int(known.max())}"
        )
    return known
