"""Work on a few heads at a time, so that what is computed on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

Group = tuple[int, slice]
"""Index of a few heads of one batch entry in [B, H, ...]."""

WORKING_BYTES = 48 << 20
"""What a method holds at once beside its input and its plan, about."""


def head_groups(batch: int, heads: int, together: int) -> Iterator[Group]:
    """``together`` heads of one batch entry at a time, until all had their turn."""
    for entry in range(batch):
        for first in range(0, heads, together):
            yield entry, slice(first, min(first + together, heads))


def groups_within(batch: int, heads: int, head_bytes: int, most: int = WORKING_BYTES) -> Iterator[Group]:
    """As many heads together as fit ``most`` bytes, one at least."""
    return head_groups(batch, heads, max(1, most // head_bytes))


def of_group(x: Tensor, group: Group) -> Tensor:
    """A group's part of something [B|1, H|1, ...] that batch entries or heads may share."""
    entry, heads = group
    own = x[min(entry, len(x) - 1)]
    return own if len(own) == 1 else own[heads]
