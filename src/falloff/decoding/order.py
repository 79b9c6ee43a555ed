"""In which order, and in which company, an image's tokens are decoded.

Locality-aware order (LPD, arXiv:2507.01957, algorithm 1): a group's tokens are drawn independently of one another,
so each should lie close to what is known (attention falls off with distance) and far from the others of its group.
For each group, cells whose known neighbours weigh at least ``proximity`` are walked from the best supported on, and
taken unless they lie within ``repulsion`` of one already taken; what is missing is filled by farthest-point sampling.

That leaves whatever is left for the last groups, which are then full of neighbours. The planned order instead sets
the last groups aside first, each by farthest-point sampling, and walks the rest as above. It needs no other training:
models are trained on uniformly random orders.

An order is an int64 permutation of raster cells: ``order[n]`` is the cell decoded at place n.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falloff.decoding.sizes import check_sizes

OrderName = Literal["locality", "planned", "halton", "random", "raster"]
ORDER_NAMES: tuple[OrderName, ...] = ("locality", "planned", "halton", "random", "raster")
PLANNED_SHARE = 0.4
"""Of the groups, how many the planned order sets aside: from there on nearly every cell has known neighbours anyway."""
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Locality:
    """What a group's cells must keep to.

    proximity: least weight of known neighbours, where an edge weighs 1 and a corner 1 / sqrt(2).
    repulsion: cells of a group are more than this apart along one axis at least; 0 leaves neighbours. Published are
        2 for 16 x 16 tokens (3 for the largest model) and 4 for 32 x 32.
    """

    proximity: float = 1.0
    repulsion: int = 2

    def __post_init__(self) -> None:
        if self.proximity < 0:
            raise ValueError(f"proximity = {self.proximity} is negative; use 0 or more")
        if self.repulsion < 0:
            raise ValueError(f"repulsion = {self.repulsion} is negative; use 0 or more cells")


def make_orders(
    name: OrderName,
    height: int,
    width: int,
    sizes: Sequence[int],
    count: int,
    generator: torch.Generator | None = None,
    *,
    locality: Locality | None = None,
    known_HW: Tensor | None = None,
) -> Tensor:
    """``count`` orders of a grid, int64 [count, height * width] on the CPU; each is drawn by itself.

    Cells that are ``known`` (boolean [height, width]) come first, in random order: sizes count them too.
    Raises ``ValueError`` for an unknown name, sizes that do not fit, or a mask of another shape.
    """
    if name not in ORDER_NAMES:
        raise ValueError(f"unknown decoding order {name!r}; choose one of {', '.join(ORDER_NAMES)}")
    check_sizes(sizes, height * width)
    known = _checked(known_HW, height, width)
    device = generator.device if generator is not None else None
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=generator, device=device)))
    rule = locality or Locality()
    drawn = [_draw(name, height, width, sizes, rng, rule, known) for _ in range(count)]
    return torch.from_numpy(np.stack(drawn))


def _checked(known_HW: Tensor | None, height: int, width: int) -> Bools:
    if known_HW is None:
        return np.zeros(height * width, dtype=np.bool_)
    if tuple(known_HW.shape) != (height, width) or known_HW.dtype != torch.bool:
        raise ValueError(
            f"the mask of known tokens must be boolean [{height}, {width}], got {known_HW.dtype} {list(known_HW.shape)}"
        )
    return np.asarray(known_HW.cpu().numpy()).reshape(-1)


def _draw(
    name: OrderName,
    height: int,
    width: int,
    sizes: Sequence[int],
    rng: np.random.Generator,
    rule: Locality,
    known: Bools,
) -> Ints:
    first = rng.permutation(np.flatnonzero(known))
    if name in ("locality", "planned"):
        aside = round(PLANNED_SHARE * len(sizes)) if name == "planned" else 0
        rest = _locality(_Board(height, width, known), _remaining(sizes, len(first)), rng, rule, aside)
    elif name == "halton":
        rest = _without(halton_order(height, width), known)
    elif name == "random":
        rest = _without(rng.permutation(height * width), known)
    else:
        rest = np.flatnonzero(~known)
    return np.concatenate([first, rest])


def _without(order: Ints, known: Bools) -> Ints:
    return order[~known[order]]


def _remaining(sizes: Sequence[int], known: int) -> list[int]:
    """Sizes of the groups, or of what is left of them, after ``known`` tokens."""
    return [min(size, end - known) for size, end in zip(sizes, accumulate(sizes), strict=True) if end > known]


def halton_order(height: int, width: int) -> Ints:
    """Cells as the two-dimensional Halton sequence (bases 2 and 3) first visits them, [height * width]."""
    points = 8 * height * width
    while True:
        rows = (_radical_inverse(points, 2) * height).astype(np.int64)
        columns = (_radical_inverse(points, 3) * width).astype(np.int64)
        cells, visits = np.unique(rows * width + columns, return_index=True)
        if len(cells) == height * width:
            return np.asarray(cells[np.argsort(visits)])
        points *= 2


def _radical_inverse(count: int, base: int) -> NDArray[np.float64]:
    """The digits of 1 .. count mirrored at the point."""
    number, value, weight = np.arange(1, count + 1), np.zeros(count), 1.0
    while number.any():
        weight /= base
        value += weight * (number % base)
        number //= base
    return value


class _Board:
    """Which cells are free, and how much each is supported by known neighbours."""

    def __init__(self, height: int, width: int, known: Bools) -> None:
        self.rows, self.columns = np.divmod(np.arange(height * width), width)
        self.height, self.width = height, width
        self.free = ~known
        self.known = known.copy()

    def set_aside(self, cells: Ints) -> None:
        self.free[cells] = False

    def decode(self, cells: Ints) -> None:
        self.free[cells] = False
        self.known[cells] = True

    def support(self) -> NDArray[np.float64]:
        """Sum over known cells of the 8-neighbourhood of 1 / distance, [height * width]."""
        known = np.pad(self.known.reshape(self.height, self.width), 1).astype(np.float64)
        upright = known[:-2] + known[2:]
        edges = upright[:, 1:-1] + known[1:-1, :-2] + known[1:-1, 2:]
        corners = upright[:, :-2] + upright[:, 2:]
        return np.asarray(edges + corners * math.sqrt(0.5)).reshape(-1)


def _locality(board: _Board, sizes: list[int], rng: np.random.Generator, rule: Locality, aside: int) -> Ints:
    """The free cells of the board in groups of the given sizes, the last ``aside`` of them chosen first."""
    first = max(0, len(sizes) - aside)
    last_groups = []
    for size in reversed(sizes[first:]):
        cells = _farthest(board, rng.permutation(np.flatnonzero(board.free)), [], size)
        board.set_aside(cells)
        last_groups.append(cells)
    groups = []
    for size in sizes[:first]:
        cells = _group(board, rng.permutation(np.flatnonzero(board.free)), size, rule)
        board.decode(cells)
        groups.append(cells)
    return np.concatenate([*groups, *reversed(last_groups), np.empty(0, dtype=np.int64)])


def _group(board: _Board, cells: Ints, size: int, rule: Locality) -> Ints:
    """``size`` of ``cells``, which come in random order."""
    support = board.support()[cells]
    ranked = cells[np.argsort(-support, kind="stable")]
    near = ranked[: int((support >= rule.proximity).sum())]
    taken = _apart(board, near, size, rule.repulsion)
    if len(taken) < size:
        others = ranked[~np.isin(ranked, taken)]
        return _farthest(board, others, taken, size)
    return np.asarray(taken, dtype=np.int64)


def _apart(board: _Board, cells: Ints, size: int, repulsion: int) -> list[int]:
    """The first ``size`` cells that are more than ``repulsion`` (Chebyshev) from every one taken before."""
    taken: list[int] = []
    closed = np.zeros((board.height, board.width), dtype=np.bool_)
    for cell in cells.tolist():
        if len(taken) == size:
            break
        row, column = divmod(cell, board.width)
        if not closed[row, column]:
            taken.append(cell)
            top, left = max(0, row - repulsion), max(0, column - repulsion)
            closed[top : row + repulsion + 1, left : column + repulsion + 1] = True
    return taken


def _farthest(board: _Board, cells: Ints, taken: list[int], size: int) -> Ints:
    """``taken`` and as many of ``cells`` as make up ``size``: always the farthest from those taken, in Euclid's sense.

    With none taken the first is the first of ``cells``.
    """
    rows, columns = board.rows[cells], board.columns[cells]
    distance = np.full(len(cells), np.iinfo(np.int64).max)
    for cell in taken:
        np.minimum(distance, (rows - board.rows[cell]) ** 2 + (columns - board.columns[cell]) ** 2, out=distance)
    chosen = list(taken)
    while len(chosen) < size:
        best = int(distance.argmax())
        chosen.append(int(cells[best]))
        np.minimum(distance, (rows - rows[best]) ** 2 + (columns - columns[best]) ** 2, out=distance)
    return np.asarray(chosen, dtype=np.int64)
