"""Which blocks of a row to compute: selectors from scores or masses [..., K] to booleans of the same shape.

A *mass* is at least 0 and need not sum to 1; a *score* is any number or -inf. Neither may hold NaN. Ties go to the
lower index, and every row keeps at least one block.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def cover(mass: Tensor, share: float | Tensor, *, least: int | Tensor = 1, equal: bool = True) -> Tensor:
    """The heaviest blocks until ``share`` of a row's mass is covered, and never fewer than ``least``.

    The block of rank r is kept when the mass of the ranks before it is at most ``share`` of the row's (below it,
    unless ``equal``), or when ``r < least``. Blocks without mass are kept for ``least`` alone, so that ``share=1``
    keeps all others. With ``equal`` this is Sparse VideoGen2's rule; without, it is the smallest set with at least
    ``share`` of the mass, as XAttention and PBS take it. ``share`` and ``least`` may be tensors [..., 1] for rows.
    """
    exact = _exact(mass)
    ordered = _descending(exact)
    up_to = ordered.cumsum(-1)
    bound = share * up_to[..., -1:]
    before = F.pad(up_to[..., :-1], (1, 0))
    below = before <= bound if equal else before < bound
    all_of_it = torch.as_tensor(share, device=mass.device) >= 1  # whatever the sum's rounding says
    count = ((ordered > 0) & (below | all_of_it)).sum(-1, keepdim=True)  # a row's first ones, for sums only rise
    count = count.maximum(torch.as_tensor(least, device=mass.device)).clamp(max=mass.shape[-1])
    return _first(exact, ordered, count)


def mass_ge(mass: Tensor, share: float | Tensor, *, least: int | Tensor = 1) -> Tensor:
    """The smallest set of blocks with at least ``share`` of a row's mass."""
    return cover(mass, share, least=least, equal=False)


def mass_le(mass: Tensor, share: float | Tensor) -> Tensor:
    """The heaviest blocks whose mass together is at most ``share`` of the row's, and the heaviest in any case.

    SpargeAttn's rule: the block that crosses the share is left out, unlike in ``cover``.
    """
    exact = _exact(mass)
    ordered = _descending(exact)
    up_to = ordered.cumsum(-1)
    count = (up_to <= share * up_to[..., -1:]).sum(-1, keepdim=True)
    return _first(exact, ordered, count.clamp(min=1))


def topk(score: Tensor, count: int | Tensor) -> Tensor:
    """Exactly ``count`` blocks of every row, those with the highest scores; all where there are no more.

    ``count``: at least 1, an int or int64 [..., 1] for rows. An int needs no full sort.
    """
    blocks = score.shape[-1]
    if isinstance(count, int):
        count = min(count, blocks)
        return _down_to(score, score.topk(count, -1).values[..., -1:], count)
    return _first(score, _descending(score), count.clamp(max=blocks).expand(*score.shape[:-1], 1))


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


def _descending(x: Tensor) -> Tensor:
    """The numbers of every row [..., K], the highest first; which block each belongs to is not needed."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):  # NumPy's sort is many times faster
        return torch.from_numpy(np.sort(x.detach().numpy(), -1)).flip(-1)
    return x.sort(dim=-1, descending=True).values


def _first(x: Tensor, ordered: Tensor, count: Tensor) -> Tensor:
    """The ``count`` [..., 1] highest blocks of every row, at least one each, given the rows in descending order."""
    return _down_to(x, ordered.gather(-1, count - 1), count)


def _down_to(x: Tensor, threshold: Tensor, count: int | Tensor) -> Tensor:
    """The blocks above the threshold, and of those at it as many, from the lowest index, as make up ``count``."""
    above, ties = x > threshold, x == threshold
    return above | ties & (ties.cumsum(-1, dtype=torch.int32) <= count - above.sum(-1, keepdim=True))
