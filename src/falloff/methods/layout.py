"""Plans from a map over the video's blocks; text is seen by every query and sees every key.

Text keys may be padding, which says nothing about a video, so that predictors leave them out and pin them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.geometry import Grid, Sequence, tile_order
from falloff.kernels.groups import groups_within
from falloff.methods.base import Dense
from falloff.methods.pooling import cut, tile_sizes
from falloff.plan import BlockMap, Plan

Tile = tuple[int, int, int]
NOT_FINITE = Dense("queries or keys are not finite")


class Prediction(NamedTuple):
    """A map over the blocks of a video's queries and keys, bool [B|1, H|1, Tq, Tk], and orders to cut them along.

    Orders are int64 [B|1, H|1, N] over the tokens that were looked at, with heads of their own where the map has.
    ``dropped``: as for a plan, of the map's shape.
    """

    on: Tensor
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    dropped: Tensor | None = None


Rule = Callable[[Tensor, Tensor, slice], Prediction]
"""From the video's queries and keys of a few heads, [1, h, N, D] each, and which of the call's heads these are."""

COPIES = 4
"""Of a head's queries and keys that a rule makes on its way, in float32, at most about."""


@dataclass(frozen=True)
class UniformBlocks:
    """Blocks of ``size`` consecutive tokens of a sequence. Those that touch text are pinned."""

    sequence: Sequence
    size: int

    @property
    def pinned(self) -> tuple[int, int]:
        """Blocks with text before and after those of video tokens alone; all of them before, where none is such."""
        count = -(-self.sequence.tokens // self.size)
        first, last = -(-self.sequence.video_start // self.size), count
        if self.sequence.text and self.sequence.text_side == "after":
            last = self.sequence.grid.tokens // self.size
        return (first, count - last) if first < last else (count, 0)

    @property
    def tokens(self) -> slice:
        """The tokens of the blocks that hold video alone."""
        before, after = self.pinned
        end = self.sequence.grid.tokens // self.size * self.size if after else self.sequence.tokens
        return slice(min(before * self.size, end), end)

    def order(self, video_order: Tensor | None) -> Tensor | None:
        """An order of these tokens, int64 [..., N], as one of the whole sequence; the others keep their place."""
        if video_order is None:
            return None
        place = torch.arange(self.sequence.tokens, device=video_order.device)
        whole = place.expand(*video_order.shape[:-1], -1).clone()
        whole[..., self.tokens] = video_order + self.tokens.start
        return whole


def predicted(
    sequence: Sequence, q_block: int, kv_block: int, q_BHND: Tensor, k_BHND: Tensor, rule: Rule
) -> Plan | Dense:
    """The plan whose map ``rule`` predicts from the queries and keys of blocks with video alone; the rest is on.

    Heads are looked at a few at a time, so that a long video's queries and keys are not copied as a whole.
    """
    q_blocks, kv_blocks = UniformBlocks(sequence, q_block), UniformBlocks(sequence, kv_block)
    q, k = q_BHND[:, :, q_blocks.tokens].detach(), k_BHND[:, :, kv_blocks.tokens].detach()
    if not finite(q, k):
        return NOT_FINITE
    if min(q.shape[2], k.shape[2]):
        made = _of_all_heads(q, k, rule)
    else:  # text touches every block
        shape = (1, 1, -(-q.shape[2] // q_block), -(-k.shape[2] // kv_block))
        made = Prediction(torch.ones(shape, dtype=torch.bool, device=q.device))
    q_order, kv_order = q_blocks.order(made.q_order), kv_blocks.order(made.kv_order)
    return uniform_plan(q_blocks, kv_blocks, made.on, kv_order, q_order, made.dropped)


def _of_all_heads(q_BHND: Tensor, k_BHND: Tensor, rule: Rule) -> Prediction:
    batch, heads, tokens, channels = q_BHND.shape
    head_bytes = COPIES * 4 * channels * (tokens + k_BHND.shape[2])
    made: list[list[Prediction]] = [[] for _ in range(batch)]
    for entry, some in groups_within(batch, heads, head_bytes):
        made[entry].append(rule(q_BHND[entry, some][None], k_BHND[entry, some][None], some))
    return _joined([_joined(row, 1) for row in made], 0)


def _joined(parts: list[Prediction], dim: int) -> Prediction:
    """Predictions of some batch entries or heads as one of all."""
    if len(parts) == 1:
        return parts[0]
    return Prediction(
        *(None if field[0] is None else torch.cat(field, dim) for field in zip(*parts, strict=True))  # type: ignore[arg-type]  # all or none
    )


def uniform_plan(
    q_blocks: UniformBlocks,
    kv_blocks: UniformBlocks,
    on_BHQK: Tensor,
    kv_order: Tensor | None = None,
    q_order: Tensor | None = None,
    dropped_BHQK: Tensor | None = None,
) -> Plan:
    """The plan of a map over the blocks of video tokens alone, [B|1, H|1, Tq, Tk]; all others are on."""
    tokens = q_blocks.sequence.tokens
    ends = (*kv_blocks.pinned, *q_blocks.pinned)
    return Plan(
        q_len=tokens,
        kv_len=tokens,
        q_sizes=q_blocks.size,
        kv_sizes=kv_blocks.size,
        blocks=BlockMap.from_dense(F.pad(on_BHQK, ends, value=True)),
        q_order=q_order,
        kv_order=kv_order,
        dropped=None if dropped_BHQK is None else BlockMap.from_dense(F.pad(dropped_BHQK, ends, value=False)),
    )


def finite(*tensors_BHND: Tensor) -> bool:
    """Whether all numbers are; their sum is finite exactly then, unless it overflows float32."""
    parts = [part for x in tensors_BHND for part in (_heads(x) if x.is_cpu else [x])]
    sums = torch.stack([part.sum(dtype=torch.promote_types(part.dtype, torch.float32)) for part in parts])
    return bool(sums.isfinite().all())


def _heads(x_BHND: Tensor) -> list[Tensor]:
    """Head by head, since a CPU copies what it sums in another dtype."""
    return [head for entry in x_BHND for head in entry]


def grid_tile_order(sequence: Sequence, tile: Tile, device: torch.device) -> Tensor:
    """The sequence's tokens tile by tile, text in its place: int64 [N]."""
    token_order = sequence.order(tile_order(sequence.grid, tile))
    assert token_order is not None
    return token_order.to(device)


def tile_plan(sequence: Sequence, tile: Tile, on_BHTT: Tensor, token_order: Tensor | None = None) -> Plan:
    """The plan of a map over the grid's tiles in raster order, [B|1, H|1, T, T]; text has blocks of its own, all on.

    ``token_order``: that of ``grid_tile_order``, from a caller who keeps it.
    """
    device = on_BHTT.device
    if token_order is None:
        token_order = grid_tile_order(sequence, tile, device)
    sizes = tile_sizes(sequence.grid, tile)
    if sequence.text:
        text = cut(sequence.text, int(sizes.max()))
        before = sequence.text_side == "before"
        sizes = torch.cat([text, sizes] if before else [sizes, text])
        ends = (len(text), 0) if before else (0, len(text))
        on_BHTT = F.pad(on_BHTT, (*ends, *ends), value=True)
    return Plan(
        q_len=sequence.tokens,
        kv_len=sequence.tokens,
        q_sizes=_as_uniform(sizes, device),
        kv_sizes=_as_uniform(sizes, device),
        blocks=BlockMap.from_dense(on_BHTT),
        q_order=token_order,
        kv_order=token_order,
    )


def three(field: str, value: object, unit: str) -> Tile:
    """A setting of three numbers of at least 1. Raises ``ValueError`` that names what is legal."""
    parts = list(value) if isinstance(value, tuple | list) else []
    if len(parts) != 3 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in parts):
        raise ValueError(f"{field} = {value!r} must be three numbers of {unit} of at least 1: frames, height, width")
    return parts[0], parts[1], parts[2]


def tiles_across(grid: Grid, tile: Tile) -> Tile:
    """Tiles along each axis."""
    return -(-grid.frames // tile[0]), -(-grid.height // tile[1]), -(-grid.width // tile[2])


def check_count(field: str, count: object, unit: str = "tokens") -> None:
    """Raise ``ValueError`` unless ``count`` is an int of at least 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{field} = {count!r} must be a number of {unit} of at least 1")


def check_share(field: str, share: object) -> None:
    """Raise ``ValueError`` unless ``share`` lies above 0 and is at most 1."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0.0 < share <= 1.0:
        raise ValueError(f"{field} = {share!r} must be above 0 and at most 1")


def _as_uniform(sizes: Tensor, device: torch.device) -> int | Tensor:
    """One size where all blocks but a smaller last one have it: kernels read whole blocks faster than tokens."""
    size = int(sizes[0])
    uniform = bool((sizes[:-1] == size).all()) and int(sizes[-1]) <= size
    return size if uniform else sizes.to(device)
