"""Radial Attention (arXiv:2506.19852): attention whose reach shrinks with distance in time.

Attention energy falls off exponentially with distance in space and time, so a token needs ever fewer keys of
frames further away. Between frames at distance d a query at raster index k sees keys l with |k - l| <= w(d):

    w(0) = w(1) = s,     w(d) = max(decay * S2 / 2^bit_length(d), block)     for d >= 2,

s tokens a frame and S2 the power of two strictly above s; frames so far away that even the undoubled width
falls below a threshold are kept only every so often. Every query also sees the first ``sink_frames`` frames.
Widths halve as distances double (paper Eq. 4), hence O(n log n) pairs in the number of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falloff.geometry import Sequence, hilbert_order, order
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.coverage import Ints, band_counts, disc_runs, reference_cells, window_seen
from falloff.plan import BlockMap, Plan

Bools = NDArray[np.bool_]
PUBLISHED_THRESHOLD = 128
"""Width in tokens below which the published code drops frames, whatever its block size."""


@dataclass(frozen=True, kw_only=True)
class Radial(Method):
    """Radial Attention over any frames x height x width, with text on either side.

    decay: scales the widths; 0 leaves the floor of one block. Legal: 0 to 1.
    block: tokens a block, and the least width; "auto" takes the largest of 128, 64, 32 that is at most a
        quarter of a frame.
    tau: a block is computed when at least this share of its token pairs is inside the window; 0 means any pair.
        Blocks that touch a query's own frame, the sink or text are always computed.
    neighbour: what is seen of the frames at distance 1: "full", "half" (|k - l| <= s / 2), or "decayed", the
        same rule as further away.
    sink_frames: first frames seen by every query.
    frame_drop: "block" keeps a distant frame every (block / width)-th time once decay * S2 / 2^bit_length(d) falls
        below the block, so that decay goes on working below the floor; "published" does so once
        S2 / 2^bit_length(d) falls below 128, without decay, as the published code.
    window: "band" of raster indices, or "disc" of two-dimensional distance with the same token budget.
    order: token order that blocks are cut from, "raster" or "hilbert" (a curve in every frame).
    mode: "coverage", or "reference" for the published code's own block rule, bit for bit.
    """

    name: ClassVar[str] = "radial"
    static: ClassVar[bool] = True
    needs_frames: ClassVar[bool] = True
    dial: ClassVar[str | None] = "decay"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "decay": Span(0.05, 1.0, log=True),
        "block": Choices(("auto", 32, 64, 128)),
        "tau": Span(0.0, 0.75),
        "neighbour": Choices(("full", "half", "decayed")),
        "sink_frames": Span(0, 2),
        "window": Choices(("band", "disc")),
    }

    decay: float = 0.2
    block: int | Literal["auto"] = "auto"
    tau: float = 0.25
    neighbour: Literal["full", "half", "decayed"] = "full"
    sink_frames: int = 1
    frame_drop: Literal["block", "published"] = "block"
    window: Literal["band", "disc"] = "band"
    order: Literal["raster", "hilbert"] = "raster"
    mode: Literal["coverage", "reference"] = "coverage"

    def __post_init__(self) -> None:
        for field, top in (("decay", 1.0), ("tau", 1.0)):
            if not 0.0 <= getattr(self, field) <= top:
                raise ValueError(f"{field} = {getattr(self, field)} is outside 0.0 to {top}")
        if self.block != "auto" and (not isinstance(self.block, int) or self.block < 1):
            raise ValueError(f'block = {self.block!r} must be a number of tokens of at least 1, or "auto"')
        if self.sink_frames < 0:
            raise ValueError(f"sink_frames = {self.sink_frames} is negative; use 0 or more frames")
        for field, legal in _CHOICES.items():
            if getattr(self, field) not in legal:
                raise ValueError(f"{field} = {getattr(self, field)!r} must be one of {', '.join(legal)}")
        if self.window == "band" and self.order != "raster":
            raise ValueError("window = 'band' counts raster indices and needs order='raster'; use window='disc'")
        if self.mode == "reference" and (self.window, self.order, self.frame_drop) != ("band", "raster", "published"):
            raise ValueError(
                "mode = 'reference' is the published rule: it needs window='band', order='raster' and "
                f"frame_drop='published', got {self.window!r}, {self.order!r} and {self.frame_drop!r}"
            )

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        sequence = call.sequence
        if self.mode == "reference" and sequence.text and sequence.text_side == "before":
            return Dense("the published block rule knows text after the video only")
        block = self.block_size(sequence)
        on = self.block_map(sequence)
        token_order = sequence.order(order(self.order, sequence.grid))
        return Plan(
            q_len=sequence.tokens,
            kv_len=sequence.tokens,
            q_sizes=block,
            kv_sizes=block,
            blocks=BlockMap.from_dense(torch.from_numpy(on)),
            q_order=token_order,
            kv_order=token_order,
        )

    def block_size(self, sequence: Sequence) -> int:
        if self.block == "auto":
            quarter = sequence.grid.frame_tokens // 4
            return next((size for size in (128, 64) if size <= quarter), 32)
        return self.block

    def widths(self, sequence: Sequence) -> list[int | None]:
        """w(d) in tokens for every frame distance d; ``None`` where the pair of frames is dropped."""
        s, block = sequence.grid.frame_tokens, self.block_size(sequence)
        power = 1 << s.bit_length()
        widths: list[int | None] = [s]
        for distance in range(1, sequence.grid.frames):
            base = power / (1 << distance.bit_length())
            near = distance == 1 and self.neighbour != "decayed"
            if self._dropped(distance, base, block) and (self.mode == "reference" or not near):
                widths.append(None)
            elif near:
                widths.append(s if self.neighbour == "full" else s // 2)
            else:
                widths.append(int(max(self.decay * base, block)))
        return widths

    def _dropped(self, distance: int, base: float, block: int) -> bool:
        """Whether frames at this distance are left out; ``base`` is their width before decay and floor."""
        width, threshold = (base * self.decay, block) if self.frame_drop == "block" else (base, PUBLISHED_THRESHOLD)
        if width >= threshold:
            return False
        if width * (distance + 1) <= threshold:  # its turn would come later; also where width is about 0
            return True
        return distance % int(threshold / width) != 0

    def block_map(self, sequence: Sequence) -> Bools:
        """Which pairs of blocks are computed, bool [T, T]."""
        if self.mode == "reference":
            return self._reference_map(sequence)
        block = self.block_size(sequence)
        counts = self.coverage(sequence)
        on: Bools = counts >= max(self.tau * block * block, 1)
        tail = sequence.tokens - (len(on) - 1) * block
        size = np.full(len(on), block)
        size[-1] = tail
        for last in (np.s_[-1], np.s_[:, -1]):  # the last block may be shorter
            on[last] = counts[last] >= np.maximum(self.tau * tail * size, 1)
        self._pin(sequence, on)
        return on

    def coverage(self, sequence: Sequence) -> NDArray[np.int32]:
        """Token pairs inside the window in every pair of blocks, int32 [T, T]; text, which is pinned, left out."""
        frames = _Frames(sequence, self.block_size(sequence))
        counts = np.zeros((frames.blocks, frames.blocks), dtype=np.int32)
        cells = self._cells(sequence, frames)
        for distance, width in enumerate(self.widths(sequence)):
            if width is None:
                continue
            for i in range(frames.count - distance):
                j = i + distance
                cell = cells(width, frames.phase[i], frames.phase[j])
                if j >= self.sink_frames:
                    counts[frames.span[i], frames.span[j]] += cell
                if i >= self.sink_frames and distance:
                    counts[frames.span[j], frames.span[i]] += cell.T
        for j in range(min(self.sink_frames, frames.count)):
            for i in range(frames.count):
                counts[frames.span[i], frames.span[j]] += cells(frames.tokens, frames.phase[i], frames.phase[j])
        return counts

    def _cells(self, sequence: Sequence, frames: _Frames) -> Callable[[int, int, int], Ints]:
        """Counts of one pair of frames from (width, phase of the queries' frame, phase of the keys')."""
        grid = sequence.grid
        token_order = hilbert_order(grid.height, grid.width).numpy() if self.order == "hilbert" else None

        @cache
        def seen(width: int, phase: int) -> Ints:
            return window_seen(disc_runs(width), frames.edges(phase), token_order, (grid.height, grid.width))

        @cache
        def cell(width: int, q_phase: int, kv_phase: int) -> Ints:
            rows, columns = frames.edges(q_phase), frames.edges(kv_phase)
            if width >= grid.frame_tokens:
                return np.multiply.outer(np.diff(rows), np.diff(columns))
            if self.window == "band":
                return band_counts(width, rows, columns)
            return np.add.reduceat(seen(width, q_phase), columns[:-1], axis=1)

        return cell

    def _pin(self, sequence: Sequence, on: Bools) -> None:
        """Switch on every block that touches a query's own frame, the sink frames or text."""
        frames = _Frames(sequence, self.block_size(sequence))
        for span in frames.span:
            on[span, span] = True
        for span in frames.span[: self.sink_frames]:
            on[:, span] = True
        if sequence.text:
            block = self.block_size(sequence)
            first = 0 if sequence.text_side == "before" else sequence.grid.tokens
            span = slice(first // block, -(-(first + sequence.text) // block))
            on[span] = True
            on[:, span] = True

    def _reference_map(self, sequence: Sequence) -> Bools:
        """The published code's map: each pair of frames is shrunk to blocks by itself, and the results or-ed.

        A block of a pair is on when, of its columns with any allowed pair, more than 0.6 have allowed pairs in
        more than a third of the block's rows. Only ceil(s / block) blocks a side are looked at, although a frame
        that starts inside a block may touch one more.
        """
        frames = _Frames(sequence, self.block_size(sequence))
        blocks = -(-frames.tokens // frames.block)
        shrink = cache(lambda *key: reference_cells(*key, tokens=frames.tokens, block=frames.block))
        on = np.zeros((frames.blocks, frames.blocks), dtype=np.bool_)
        widths = self.widths(sequence)
        for i in range(frames.count):
            for j in range(frames.count):
                width = frames.tokens if j < self.sink_frames else widths[abs(i - j)]
                if width is None:
                    continue
                a, b = frames.span[i].start, frames.span[j].start
                on[a : a + blocks, b : b + blocks] |= shrink(width, frames.phase[i], frames.phase[j])
        after_video = sequence.grid.tokens // frames.block
        on[after_video:] = True
        on[:, after_video:] = True
        return on


class _Frames:
    """Where the frames of a sequence lie on its blocks."""

    def __init__(self, sequence: Sequence, block: int) -> None:
        self.block = block
        self.count = sequence.grid.frames
        self.tokens = sequence.grid.frame_tokens
        self.blocks = -(-sequence.tokens // block)
        starts = [sequence.video_start + i * self.tokens for i in range(self.count)]
        self.phase = [start % block for start in starts]
        """Offset of each frame's first token in its block."""
        self.span = [slice(start // block, -(-(start + self.tokens) // block)) for start in starts]
        """Blocks that each frame touches."""

    def edges(self, phase: int) -> Ints:
        """Block edges inside a frame that starts at ``phase`` in its block, from 0 to the frame's tokens."""
        return np.concatenate(([0], np.arange(self.block - phase, self.tokens, self.block), [self.tokens]))


_CHOICES = {
    "neighbour": ("full", "half", "decayed"),
    "frame_drop": ("block", "published"),
    "window": ("band", "disc"),
    "order": ("raster", "hilbert"),
    "mode": ("coverage", "reference"),
}
