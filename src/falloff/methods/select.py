"""Which blocks of a row to compute: selectors from scores or masses [..., K] to booleans of the same shape.

A *mass* is at least 0 and need not sum to 1; a *score* is any number or -inf. Neither may hold NaN. Ties go to the
lower index, and every row keeps at least one block.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cover(mass: Tensor, share: float | Tensor, *, least: int | Tensor = 1, equal: bool = True) -> Tensor:
    """The heaviest blocks until ``share`` of a row's mass is covered, and never fewer than ``least``.

    The block of rank r is kept when the mass of the ranks before it is at most ``share`` of the row's (below it,
    unless ``equal``), or when ``r < least``. Blocks without mass are kept for ``least`` alone, so that ``share=1``
    keeps all others. With ``equal`` this is Sparse VideoGen2's rule; without, it is the smallest set with at least
    ``share`` of the mass, as XAttention and PBS take it. ``share`` and ``least`` may be tensors [..., 1] for rows.
    """
    ordered, rank_to_block = _exact(mass).sort(dim=-1, descending=True, stable=True)
    up_to = ordered.cumsum(-1)
    before = torch.cat([torch.zeros_like(up_to[..., :1]), up_to[..., :-1]], -1)
    bound = share * up_to[..., -1:]
    below = before <= bound if equal else before < bound
    all_of_it = torch.as_tensor(share, device=mass.device) >= 1  # whatever the sum's rounding says
    rank = torch.arange(mass.shape[-1], device=mass.device)
    return _placed((ordered > 0) & (below | all_of_it) | (rank < least), rank_to_block)


def mass_ge(mass: Tensor, share: float | Tensor, *, least: int | Tensor = 1) -> Tensor:
    """The smallest set of blocks with at least ``share`` of a row's mass."""
    return cover(mass, share, least=least, equal=False)


def mass_le(mass: Tensor, share: float | Tensor) -> Tensor:
    """The heaviest blocks whose mass together is at most ``share`` of the row's, and the heaviest in any case.

    SpargeAttn's rule: the block that crosses the share is left out, unlike in ``cover``.
    """
    ordered, rank_to_block = _exact(mass).sort(dim=-1, descending=True, stable=True)
    up_to = ordered.cumsum(-1)
    kept = up_to <= share * up_to[..., -1:]
    kept[..., 0] = True
    return _placed(kept, rank_to_block)


def topk(score: Tensor, count: int | Tensor) -> Tensor:
    """Exactly ``count`` blocks of every row, those with the highest scores; all where there are no more.

    ``count``: at least 1, an int or int64 [..., 1] for rows. An int needs no full sort.
    """
    blocks = score.shape[-1]
    if isinstance(count, int):
        count = min(count, blocks)
        threshold = score.topk(count, -1).values[..., -1:]
    else:
        count = count.clamp(max=blocks).expand(*score.shape[:-1], 1)
        threshold = score.sort(dim=-1, descending=True).values.gather(-1, count - 1)
    above, ties = score > threshold, score == threshold
    return above | ties & (ties.cumsum(-1) <= count - above.sum(-1, keepdim=True))


def union(score: Tensor, count: int | Tensor, share: float | Tensor) -> Tensor:
    """The ``count`` highest blocks and the smallest set with ``share`` of the softmax's mass together.

    SpargeAttention2's rule (arXiv:2602.13515): a flat row needs its share, a spiky one its count. A row of -inf alone
    has no mass.
    """
    mass = _exact(score).softmax(-1).nan_to_num()
    return topk(score, count) | mass_ge(mass, share)


def near(score: Tensor, margin: float, anchor: Tensor | None = None) -> Tensor:
    """Blocks whose score is at most ``margin`` below the ``anchor`` [..., 1], by default a row's highest score.

    One comparison instead of a sort and a sum. An anchor of the caller's may leave a row without any block.
    """
    anchor = score.amax(-1, keepdim=True) if anchor is None else anchor
    return score + margin >= anchor


def _exact(mass: Tensor) -> Tensor:
    """In float32 at least: a running sum in half precision stops growing long before the end of a long row."""
    return mass.to(torch.promote_types(mass.dtype, torch.float32))


def _placed(kept_by_rank: Tensor, rank_to_block: Tensor) -> Tensor:
    return torch.zeros_like(kept_by_rank).scatter_(-1, rank_to_block, kept_by_rank)
