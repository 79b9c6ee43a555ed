"""Muon: momentum whose matrix updates are orthogonalised (Jordan et al., 2024).

Unlike `torch.optim.Muon` it works in fp32, on all matrices of a shape at once: what two CPU cores want.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch


class Muon(torch.optim.Optimizer):
    """W <- W - lr sqrt(max(1, rows / columns)) orthogonal(momentum), convolutions taken as [out, rest]."""

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # torch has it overloaded
        for group in self.param_groups:
            shapes: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append(parameter)
            for parameters in shapes.values():
                momenta = torch.stack([self._nesterov(p, group["momentum"]) for p in parameters])
                update = orthogonal(momenta.flatten(2))
                update *= -group["lr"] * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
                for parameter, change in zip(parameters, update, strict=True):
                    parameter.add_(change.view_as(parameter))

    def _nesterov(self, parameter: torch.nn.Parameter, momentum: float) -> torch.Tensor:
        gradient = parameter.grad
        assert gradient is not None  # only such parameters come here
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(gradient, 1 - momentum)
        buffer: torch.Tensor = state["momentum"]
        return gradient.lerp(buffer, momentum)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest semi-orthogonal matrix to each of [n, rows, columns], about: five Newton-Schulz steps."""
    wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
    x = wide / (wide.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    upright: torch.Tensor = x if wide is matrices else x.mT
    return upright


def optimizers(
    matrices: Iterable[torch.nn.Parameter], model: torch.nn.Module, rates: tuple[float, float]
) -> dict[str, torch.optim.Optimizer]:
    """Muon for `matrices` and AdamW for the model's other parameters, with a learning rate each."""
    chosen = list(matrices)
    inside = {id(p) for p in chosen}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return {
        "muon": Muon(chosen, rates[0]),
        "adamw": torch.optim.AdamW(rest, rates[1], betas=(0.9, 0.99), weight_decay=0.01),
    }


def set_rate(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Scale every learning rate to `factor` of what the optimizer was made with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * optimizer.defaults["lr"]
