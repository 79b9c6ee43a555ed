"""What a method has learned for the layers of a session's models: one small module each, kept outside of the models.

So a model's weights, type and files stay what they were; the parameters follow the device that the model computes on.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from falloff.geometry import Sequence
from falloff.kernels.masks import valid_keys
from falloff.methods.base import Method
from falloff.methods.branch import Branch, Layer, Work
from falloff.plan import Plan


class Trained:
    """``modules``: a ``Branch`` by number of the model and of the layer; empty for a method that learns nothing."""

    def __init__(self) -> None:
        self.modules = nn.ModuleDict()
        self._by_layer: dict[tuple[int, int], Branch] = {}
        """The same modules, for the question of every call: to look through ``modules`` takes longer than its rest."""
        self._device: torch.device | None = None
        self._gradients = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Trained:
        twin = Trained()
        twin.modules = copy.deepcopy(self.modules, memo)
        twin._by_layer = copy.deepcopy(self._by_layer, memo)  # by the memo, the same modules again
        return twin

    def add(self, method: Method, model: int, layer: int, shape: Layer, device: torch.device) -> Branch:
        """New parameters for a layer."""
        layers, branch = self.layers(model), method.branch(shape).to(device)
        layers[str(layer)] = branch
        self.modules[str(model)] = layers
        self._by_layer[model, layer] = branch
        return branch

    def layers(self, model: int) -> nn.ModuleDict:
        """The parameters of a model's layers, by their numbers."""
        layers = self.modules[str(model)] if str(model) in self.modules else nn.ModuleDict()
        assert isinstance(layers, nn.ModuleDict)
        return layers

    def of(self, model: int, layer: int) -> Branch | None:
        """The parameters of a layer, if it has some."""
        return self._by_layer.get((model, layer))

    def read_hidden(self, model: int) -> bool:
        """Whether a model's parameters act on hidden states."""
        return any(isinstance(branch, Branch) and branch.reads_hidden for branch in self.layers(model).values())

    def begin(self, device: torch.device) -> None:
        """A forward starts on a device. Moved in place, so that optimizers keep their hold."""
        self._gradients = torch.is_grad_enabled()
        if self._device != device:
            self._device = device
            self.modules.to(device)

    def awaits_gradient(self, model: int, layer: int) -> bool:
        """Whether a layer's parameters are to be trained by the forward that runs."""
        branch = self.of(model, layer)
        return self._gradients and branch is not None and any(each.requires_grad for each in branch.parameters())


def extended(
    branch: Branch,
    plan: Plan,
    sequence: Sequence,
    tensors_BSHD: tuple[Tensor, Tensor, Tensor, Tensor],
    mask: Tensor | None,
    scale: float | None,
    hidden: Tensor | None,
    first_head: int,
) -> Tensor:
    """The output of a call with what its layer has learned, [B, S, H, D], from q, k, v and the output without.

    ``hidden``: the layer's input [B, S, C] or that of the grid's tokens alone. ``first_head``: see ``Work``.
    """
    q, k, v, out = (x.transpose(1, 2) for x in tensors_BSHD)
    work = Work(
        plan=plan,
        q_BHND=q,
        k_BHND=k,
        v_BHND=v,
        out_BHND=out,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        key_valid_BN=valid_keys(mask, len(q)),
        hidden_BSC=hidden,
        hidden_tokens=_covered(hidden, sequence),
        sequence=sequence,
        first_head=first_head,
    )
    with torch.autocast(q.device.type, enabled=False):  # its sums are too long for half precision
        made: Tensor = branch(work)
    return made.transpose(1, 2)


def _covered(hidden: Tensor | None, sequence: Sequence) -> slice | None:
    """The tokens of a sequence that hidden states [B, S, C] are of: all, or those of the grid."""
    if hidden is None or hidden.shape[1] == sequence.tokens:
        return None
    return slice(sequence.video_start, sequence.video_start + sequence.grid.tokens)
