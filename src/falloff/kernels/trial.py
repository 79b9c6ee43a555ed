"""Tiny calls that show whether a foreign kernel computes what its name says."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from falloff.kernels.needs import Needs
from falloff.plan import BlockMap, Plan, Sizes

HEADS = 2
Q_SIZES, KV_SIZES = (40, 0, 33), (40, 0, 24, 65)  # for plans whose blocks vary


class Trial(NamedTuple):
    """What a kernel may treat in a way of its own. Blocks of ``None`` vary in size.

    ``ragged``: the last block of queries, of keys is shorter. ``own_maps``: batch entries, heads have maps of their
    own. ``partial``: some queries see nothing.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    q_block: int | None
    kv_block: int | None
    ragged: tuple[bool, bool] = (True, True)
    own_maps: tuple[bool, bool] = (False, True)
    partial: bool = False
    lse: bool = True
    grad: bool = False

    @staticmethod
    def like(needs: Needs) -> Trial:
        """The trial that tells most about a call."""
        plan, q = needs.plan, needs.q_BHND
        q_block, kv_block = (size if isinstance(size, int) else None for size in (plan.q_sizes, plan.kv_sizes))
        return Trial(
            q.device,
            q.dtype,
            q.shape[3],
            q_block,
            kv_block,
            (_ragged(plan.q_len, q_block), _ragged(plan.kv_len, kv_block)),
            (plan.blocks.shape[0] > 1, plan.blocks.shape[1] > 1),
            plan.partial,
            needs.lse,
            needs.grad,
        )

    @property
    def batch(self) -> int:
        return 1 + self.own_maps[0]

    def plans(self) -> tuple[Plan, Plan]:
        """Two calls of one shape whose maps have no pair in common."""
        q_sizes, q_len, q_blocks = _side(self.q_block, 2, Q_SIZES, self.ragged[0], self.device)
        kv_sizes, kv_len, kv_blocks = _side(self.kv_block, 3, KV_SIZES, self.ragged[1], self.device)
        entry, head, row, column = torch.meshgrid(
            *(torch.arange(n, device=self.device) for n in (self.batch, 1 + self.own_maps[1], q_blocks, kv_blocks)),
            indexing="ij",
        )
        even = (entry + head + row + column) % 2 == 0
        seen = (row > 0) if self.partial else torch.ones_like(even)
        first, second = (
            Plan(
                q_len=q_len,
                kv_len=kv_len,
                q_sizes=q_sizes,
                kv_sizes=kv_sizes,
                blocks=BlockMap.from_dense(blocks & seen),
                partial=self.partial,
            )
            for blocks in (even, ~even)
        )
        return first, second

    def tensors(self, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [batch, heads, N, D], strided as models give them."""
        generator = torch.Generator().manual_seed(0)
        q, k, v = (
            torch.randn(self.batch, n, HEADS, self.head_dim, generator=generator)
            .to(self.device, self.dtype)
            .transpose(1, 2)
            for n in (plan.q_len, plan.kv_len, plan.kv_len)
        )
        return q, k, v


def _ragged(length: int, block: int | None) -> bool:
    return block is not None and length % block != 0


def _side(
    block: int | None, whole: int, varying: tuple[int, ...], ragged: bool, device: torch.device
) -> tuple[Sizes, int, int]:
    """Sizes, tokens and blocks."""
    if block is None:
        return torch.tensor(varying, device=device), sum(varying), len(varying)
    length = whole * block + (block // 2 if ragged else 0)
    return block, length, -(-length // block)
