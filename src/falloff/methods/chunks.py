"""Work on a few heads at a time, so that what methods compute on the way stays small."""

from __future__ import annotations

from collections.abc import Iterator

WORKING_BYTES = 48 << 20
"""What a method holds at once beside its input and its plan, about."""


def head_groups(batch: int, heads: int, together: int) -> Iterator[tuple[int, slice]]:
    """Indices of [B, H, ...] for ``together`` heads of one batch entry each, until all had their turn."""
    for entry in range(batch):
        for first in range(0, heads, together):
            yield entry, slice(first, min(first + together, heads))


def groups_within(batch: int, heads: int, head_bytes: int) -> Iterator[tuple[int, slice]]:
    """As many heads together as fit ``WORKING_BYTES``, one at least."""
    return head_groups(batch, heads, max(1, WORKING_BYTES // head_bytes))
