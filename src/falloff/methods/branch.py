"""What a method may have learned for a layer: a small module that adds to what a kernel made of the kept pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from falloff.geometry import Sequence
from falloff.plan import Plan


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A self-attention layer: its heads, channels of a head, channels of its hidden states, and their type."""

    heads: int
    head_dim: int
    width: int
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """One call whose kept pairs are computed.

    ``out_BHND``: what a kernel made of them. ``key_valid_BN``: the keys that are no padding, where some are.
    ``hidden_BSC``: the layer's hidden states, for a branch that reads them, of the tokens ``hidden_tokens``,
    which is ``None`` for all.
    ``sequence``: the grid and text that the tokens are of, for a branch that is fitted.
    ``first_head``: number in the model of the first head, where processes share the heads.
    """

    plan: Plan
    q_BHND: Tensor
    k_BHND: Tensor
    v_BHND: Tensor
    out_BHND: Tensor
    scale: float
    key_valid_BN: Tensor | None = None
    hidden_BSC: Tensor | None = None
    hidden_tokens: slice | None = None
    sequence: Sequence | None = None
    first_head: int = 0


class Branch(nn.Module, ABC):
    """The parameters of one layer, which at first change as little of the sparse output as can be.

    ``reads_hidden``: it needs the hidden states that queries and keys were made of. ``fitting``: it is being fitted to
    dense attention, so that a choice through which no gradient comes is to be made softly.
    """

    reads_hidden: ClassVar[bool] = False
    fitting: bool = False

    @abstractmethod
    def forward(self, work: Work) -> Tensor:
        """The layer's output [B, H, N, D], in the type of the sparse one."""


def blank_linear(inputs: int, outputs: int, *, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    """A linear layer of zeros; unlike PyTorch's own start this draws nothing from the global generator."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=dtype)  # type: ignore[no-untyped-call]  # PyTorch left it untyped
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert isinstance(layer, nn.Linear)
    return layer
