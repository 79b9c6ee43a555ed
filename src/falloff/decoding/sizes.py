"""How many tokens each step of parallel decoding puts out.

Group k of K takes N (cos((k - 1) pi / 2K) - cos(k pi / 2K)) of N tokens, rounded: few at first, when little is known,
and ever more. Checkpoints were trained on the published lists, which depart from the rule by a token here and there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

PUBLISHED: dict[tuple[int, int], tuple[int, ...]] = {
    (256, 8): (1, 15, 24, 32, 40, 45, 49, 50),
    (256, 12): (1, 7, 11, 15, 19, 22, 25, 28, 30, 32, 33, 33),
    (256, 16): (1, 4, 6, 8, 11, 13, 15, 17, 19, 20, 22, 23, 24, 24, 24, 25),
    (256, 20): (1, 2, 4, 5, 7, 8, 10, 11, 12, 14, 15, 16, 17, 18, 18, 19, 19, 20, 20, 20),
    (256, 24): (*range(1, 12), 11, 12, 13, 14, 14, 14, 15, 15, 16, 16, 16, 17, 17),
    (256, 32): (1, 1, 2, 2, 3, 3, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 10, 11, 11, 11, 11, *[12] * 8),
    (1024, 32): (
        *(1, 4, 6, 9, 11, 13, 16, 18, 20, 23, 25, 27, 29, 31, 33, 35, 36, 38),
        *(40, 41, 42, 44, 45, 46, 47, 48, 48, 49, 49, 50, 50, 50),
    ),
    (1024, 48): (
        *range(1, 24),
        *(23, 24, 25, 26, 26, 27, 28, 28, 29, 29, 30, 30, 31, 31, 32, 32, 32),
        *[33] * 7,
        34,
    ),
}
"""(tokens, steps) to group sizes."""


def group_sizes(tokens: int, steps: int) -> tuple[int, ...]:
    """The published sizes of this many groups where there are any, else ``cosine_sizes``."""
    return PUBLISHED.get((tokens, steps)) or cosine_sizes(tokens, steps)


def cosine_sizes(tokens: int, steps: int) -> tuple[int, ...]:
    """``steps`` sizes along the cosine: at least 1, the first exactly 1, never falling, summing to ``tokens``.

    Raises ``ValueError`` when there are more steps than tokens, or one step for several tokens.
    """
    fewest = min(tokens, 2)
    if not fewest <= steps <= tokens:
        raise ValueError(f"{tokens} tokens are decoded in {fewest} to {tokens} steps, got {steps}")
    angles = [k * math.pi / (2 * steps) for k in range(steps + 1)]
    exact = [tokens * (math.cos(a) - math.cos(b)) for a, b in pairwise(angles)]
    sizes = [1] + [max(1, round(size)) for size in exact[1:]]
    while (left := tokens - sum(sizes)) != 0:
        change = 1 if left > 0 else -1
        legal = [k for k in range(1, steps) if _stays_sorted(sizes, k, change)]
        sizes[max(legal, key=lambda k: (change * (exact[k] - sizes[k]), k))] += change
    return tuple(sizes)


def _stays_sorted(sizes: Sequence[int], k: int, change: int) -> bool:
    if change > 0:
        return k + 1 == len(sizes) or sizes[k] < sizes[k + 1]
    return sizes[k] > sizes[k - 1]


def check_sizes(sizes: Sequence[int], tokens: int) -> None:
    """Raise ``ValueError`` unless the sizes are positive, begin with 1 and sum to ``tokens``."""
    if not sizes or sizes[0] != 1:
        raise ValueError(f"the first group is one token, got group sizes {list(sizes)}")
    if min(sizes) < 1:
        raise ValueError(f"a group has at least one token, got group sizes {list(sizes)}")
    if sum(sizes) != tokens:
        raise ValueError(f"the model decodes {tokens} tokens, the group sizes sum to {sum(sizes)}: {list(sizes)}")
