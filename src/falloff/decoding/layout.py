"""Who sees whom when all groups are trained in one pass.

Rows are the class, N context tokens and N queries, both in decoding order. Every row has a group id: 0 for the class,
2k for the context of group k, 2k - 1 for its queries. Row i sees row j when

    id_i = id_j,   or   j is context and id_j < id_i:

a group's context sees the class, earlier groups and itself; its queries see the class, earlier groups and one another;
nobody else sees queries. The last group's context is seen by no query. It is kept, so that the number of rows is
2N + 1 whatever the groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from falloff.decoding.sizes import check_sizes

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from falloff.decoding.transformer import Attend


def group_ids(sizes: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """Group ids of all rows, int64 [samples, 2 tokens + 1]; every sample has its own groups."""
    for each in sizes:
        check_sizes(each, tokens)
    numbers = [torch.arange(1, len(each) + 1).repeat_interleave(torch.tensor(each)) for each in sizes]
    group = torch.stack(numbers)
    return torch.cat([torch.zeros(len(group), 1, dtype=torch.int64), 2 * group, 2 * group - 1], dim=1)


def dense_mask(ids_BS: Tensor, context: int) -> Tensor:
    """Which pairs are seen, boolean [B, 1, S, S]; the first ``context`` rows are class and tokens."""
    row, column = ids_BS[:, :, None], ids_BS[:, None, :]
    is_context = torch.arange(ids_BS.shape[1], device=ids_BS.device) < context
    return ((row == column) | (is_context & (column < row)))[:, None]


def flex_mask(ids_BS: Tensor, context: int) -> BlockMask:
    """The same as blocks for FlexAttention, whole blocks of it being skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (ids_BS[b, i] == ids_BS[b, j]) | ((j < context) & (ids_BS[b, j] < ids_BS[b, i]))

    batch, rows = ids_BS.shape
    return create_block_mask(seen, batch, None, rows, rows, device=str(ids_BS.device))


def attending(mask: Tensor | BlockMask) -> Attend:
    """Attention under a mask of either kind: PyTorch's own, or compiled FlexAttention."""
    if isinstance(mask, Tensor):

        def dense(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

        return dense

    def sparse(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = _compiled_flex()(q, k, v, block_mask=mask)
        return out

    return sparse


@cache
def _compiled_flex() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def visible_pairs(sizes: Sequence[int]) -> int:
    """Pairs of rows that are seen, the last group's context left out.

    With s_0 = 1, s_i = g_i, c_i = 1 + g_1 + ... + g_i:  sum_{i < K} s_i c_i  +  sum_k g_k (c_{k-1} + g_k).
    """
    ends = list(accumulate(sizes, initial=1))
    context = sum(size * end for size, end in zip([1, *sizes[:-1]], ends[:-1], strict=True))
    return context + sum(size * (before + size) for size, before in zip(sizes, ends[:-1], strict=True))
