"""Video sparse attention, VSA (arXiv:2505.13389): tiles of the grid scored by their means, and a gated coarse answer.

The grid is cut into tiles of (frames, height, width) tokens. With means q_i and k_j over the tokens of a tile, every
row of tiles keeps the tiles of the

    max(1, ceil((1 - sparsity) T))

highest q_i . k_j, ties going to the lower tile. The trained method adds attention between the means themselves, the
same for all tokens of a tile, by a gate that a linear layer makes of the layer's hidden states x:

    O = O^f + g(x) O^c,    O^c_i = sum_j softmax_j(q_i . k_j / sqrt(d)) v_j over means, whatever their tiles' sizes.

The gate is zero at first. Blocks of text count as tiles in O^c; text whose hidden states the layer keeps apart from the
video's has no gate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from falloff.geometry import Grid, Sequence
from falloff.kernels.blocks import kv_blocks, means, q_blocks
from falloff.kernels.needs import differentiable
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.branch import Branch, Layer, Work, blank_linear
from falloff.methods.layout import NOT_FINITE, Tile, finite, grid_tile_order, three, tile_plan
from falloff.methods.pooling import tile_means
from falloff.methods.select import topk
from falloff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class VSA(Method):
    """The fine stage of video sparse attention over any frames x height x width; text sees all and is seen by all.

    sparsity: share of the tiles that a query leaves out, at least 0 and below 1.
    gate: add the coarse answer, by a gate that has to be trained; without, no model needs training.
    tile: tokens of a tile along (frames, height, width); "auto" takes 4x4x4, and 1x8x8 for grids of one frame. Tiles
        at the far ends of the grid may be smaller, and count as tiles all the same.
    """

    name: ClassVar[str] = "vsa"
    dial: ClassVar[str | None] = "sparsity"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "sparsity": Span(0.3, 0.95),
        "tile": Choices(("auto", (2, 4, 4), (2, 2, 4), (2, 2, 2))),
    }

    sparsity: float = 0.5
    tile: tuple[int, ...] | Literal["auto"] = "auto"
    gate: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.sparsity, bool) or not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity = {self.sparsity} must be at least 0 and below 1")
        if self.tile != "auto":
            object.__setattr__(self, "tile", three("tile", self.tile, "tokens"))

    @property
    def learns(self) -> bool:
        return self.gate

    @property
    def branch_settings(self) -> dict[str, Any]:
        return {"tile": self.tile}

    def branch(self, layer: Layer) -> Gated:
        return Gated(layer.width, layer.heads * layer.head_dim, dtype=layer.dtype)

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        sequence, tile = call.sequence, self.tile_of(call.sequence.grid)
        video = slice(sequence.video_start, sequence.video_start + sequence.grid.tokens)
        q, k = q_BHND[:, :, video].detach(), k_BHND[:, :, video].detach()
        if not finite(q, k):
            return NOT_FINITE
        scores = tile_means(q, sequence.grid, tile) @ tile_means(k, sequence.grid, tile).mT
        on = topk(scores, self.kept(scores.shape[-1]))
        return tile_plan(sequence, tile, on, self._token_order(sequence, q.device, state))

    def tile_of(self, grid: Grid) -> Tile:
        """The tile that a grid is cut into."""
        if self.tile == "auto":
            return (1, 8, 8) if grid.frames == 1 else (4, 4, 4)
        frames, height, width = self.tile
        return frames, height, width

    def kept(self, tiles: int) -> int:
        """Tiles that every query sees, of ``tiles``."""
        share = (1 - self.sparsity) * tiles
        return max(1, math.ceil(share - 1e-9 * tiles))  # 1 - 0.7 is a little more than 0.3

    def _token_order(self, sequence: Sequence, device: torch.device, state: State) -> Tensor:
        """Made once as long as the sequence stays the same."""
        wanted = (sequence, device)
        if state.values.get("tiled") != wanted:
            state.values["tiled"] = wanted
            state.values["order"] = grid_tile_order(sequence, self.tile_of(sequence.grid), device)
        order: Tensor = state.values["order"]
        return order


class Gated(Branch):
    """One layer's gate: from hidden states of ``width`` channels to all channels of the heads, in the model's type."""

    reads_hidden = True

    def __init__(self, width: int, channels: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = blank_linear(width, channels, bias=True, dtype=dtype)

    def forward(self, work: Work) -> Tensor:
        hidden = work.hidden_BSC
        assert hidden is not None  # it is read, so that the host gives it
        q_means, _ = means(q_blocks(work.plan), work.q_BHND)
        k_means, counts = means(kv_blocks(work.plan), work.k_BHND, work.key_valid_BN)
        v_means, _ = means(kv_blocks(work.plan), work.v_BHND, work.key_valid_BN)
        coarse = coarse_attention(work.scale * q_means, k_means, v_means, counts > 0)
        block = work.plan.q_block_of()[..., None].expand(*work.q_BHND.shape)
        return (work.out_BHND + self._gates(work, hidden) * coarse.gather(2, block)).to(work.out_BHND.dtype)

    def _gates(self, work: Work, hidden_BSC: Tensor) -> Tensor:
        """Of every token, [B, H, N, D]; zeros where there are no hidden states."""
        heads, tokens = work.q_BHND.shape[1:3]
        covered = work.hidden_tokens or slice(0, tokens)
        if hidden_BSC.shape[:-1] != (len(work.q_BHND), covered.stop - covered.start):
            raise ValueError(
                f"hidden states {list(hidden_BSC.shape)} are neither of the {tokens} tokens of the call nor of the "
                "video's alone, so that they make no gate; use gate=False with this model"
            )
        gates: Tensor = self.gate(hidden_BSC.to(self.gate.weight.dtype)).unflatten(2, (heads, -1)).transpose(1, 2)
        return F.pad(gates, (0, 0, covered.start, tokens - covered.stop))


def coarse_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, some_BHT: Tensor) -> Tensor:
    """Attention of block means to those of blocks that hold ``some`` token; scores are made again for a gradient."""
    bias = torch.zeros_like(some_BHT, dtype=q_BHTD.dtype).masked_fill(~some_BHT, -torch.inf)[..., None, :]
    if differentiable(q_BHTD, k_BHTD, v_BHTD):
        again: Tensor = checkpoint(
            _softmax_mean, q_BHTD, k_BHTD, v_BHTD, bias, use_reentrant=False, preserve_rng_state=False
        )
        return again
    return _softmax_mean(q_BHTD, k_BHTD, v_BHTD, bias)


def _softmax_mean(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT + bias).softmax(-1) @ v
