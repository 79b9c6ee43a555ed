"""What decoding costs, as numbers, and where a model looks: whether locality is worth keeping to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from falloff.decoding.layout import dense_mask, group_ids, visible_pairs
from falloff.decoding.sizes import check_sizes
from falloff.decoding.transformer import LPDTransformer


@dataclass(frozen=True)
class Cost:
    """Of one image, the pixels not counted.

    forwards: passes through the model. rows: token rows that passed. flops: of matrix products, one multiplication
    and one addition being two. cache_bytes: keys and values of the class and all tokens.
    """

    forwards: int
    rows: int
    flops: int
    cache_bytes: int


def cost(model: LPDTransformer, sizes: Sequence[int], *, guided: bool) -> Cost:
    """Of decoding in groups of these sizes; guidance doubles all but the number of passes.

    With N tokens, K groups, L layers, width D, vocabulary V:  rows = 2N + 1 - g_K,
    flops = 24 L D^2 rows + 4 L D visible_pairs + 2 D V N,  cache = 2 L D (N + 1) values.
    """
    check_sizes(sizes, model.tokens)
    config, copies = model.config, 1 + guided
    layers, width, tokens = config.layers, config.width, model.tokens
    rows = 2 * tokens + 1 - sizes[-1]
    linear = 24 * layers * width**2 * rows + 2 * width * config.vocabulary * tokens
    attention = 4 * layers * width * visible_pairs(sizes)
    cache = 2 * layers * width * (tokens + 1) * model.dtype.itemsize
    return Cost(len(sizes), copies * rows, copies * (linear + attention), copies * cache)


@torch.no_grad()
def attention_by_distance(
    model: LPDTransformer, tokens_BN: Tensor, labels_B: Tensor, orders_BN: Tensor, sizes: Sequence[int]
) -> Tensor:
    """Attention that a query pays, on average, to one known token at distance s: [layers, 1 + largest distance].

    Per-token attention of LPD (arXiv:2507.01957): PTA_s = mean over queries i of sum_j A_ij [d_ij = s] over
    sum_j [d_ij = s], for the known tokens j of i, averaged over heads and images. d is Euclid's distance between
    cells, rounded; NaN where no pair has it (always at 0). ``tokens_BN``: images in raster order.
    """
    device, tokens = tokens_BN.device, model.tokens
    mask = dense_mask(group_ids([sizes], tokens), 1 + tokens).to(device)
    known_NN = _known(mask)
    distance_BNN = _distances(orders_BN, model.config.grid_width)
    found: list[Tensor] = []

    def attend(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
        weights = scores.softmax(dim=-1)
        found.append(_mean_at_distance(weights[:, :, 1 + tokens :, 1 : 1 + tokens], distance_BNN, known_NN))
        out: Tensor = weights @ v
        return out

    model(labels_B, tokens_BN.gather(1, orders_BN), orders_BN, orders_BN, attend)
    return torch.stack(found)


def even_attention_by_distance(orders_BN: Tensor, sizes: Sequence[int], width: int) -> Tensor:
    """The same of queries that look at all they see alike, [1 + largest distance]. ``width``: of the grid.

    It is not level: a query with few known tokens pays each of them much, and seldom has one at a given distance.
    """
    tokens = orders_BN.shape[1]
    mask = dense_mask(group_ids([sizes], tokens), 1 + tokens).to(orders_BN.device)
    even_NN = (mask / mask.sum(dim=-1, keepdim=True))[:, :, 1 + tokens :, 1 : 1 + tokens]
    return _mean_at_distance(even_NN, _distances(orders_BN, width), _known(mask))


def _known(mask_11SS: Tensor) -> Tensor:
    """Which tokens each query sees, [N, N]."""
    tokens = mask_11SS.shape[-1] // 2
    return mask_11SS[0, 0, 1 + tokens :, 1 : 1 + tokens]


def _distances(orders_BN: Tensor, width: int) -> Tensor:
    """Between the cells at any two places, rounded, int64 [B, N, N]."""
    rows, columns = (orders_BN // width).float(), (orders_BN % width).float()
    down, right = rows[:, :, None] - rows[:, None], columns[:, :, None] - columns[:, None]
    return (down.square() + right.square()).sqrt().round().long()


def _mean_at_distance(weights_BHNN: Tensor, distance_BNN: Tensor, known_NN: Tensor) -> Tensor:
    means = []
    for s in range(int(distance_BNN.max()) + 1):
        hit = (distance_BNN == s) & known_NN
        count = hit.sum(dim=2)
        paid = (weights_BHNN.mean(dim=1) * hit).sum(dim=2)
        means.append((paid / count)[count > 0].mean())
    return torch.stack(means)
