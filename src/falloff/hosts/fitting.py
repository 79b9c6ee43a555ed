"""The layers of an attached model, each for itself, against dense attention: per-layer output distillation.

A forward runs on dense attention throughout and without gradients, so that no layer answers for what those before it
left out. On its way every planned layer also computes its output o with what the method has learned, from the same
queries, keys, values and hidden states, and its error is

    || o - dense ||^2 / || dense ||^2.

A layer's gradient is taken at once and what it was computed from is given up: never is more held than for one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from falloff.geometry import Grid
from falloff.hosts import op
from falloff.hosts.diffusers import Attachment, attached
from falloff.kernels.masks import valid_keys
from falloff.methods.branch import Branch
from falloff.session import DenseBackend, MethodError, Seat, Session


def output_error(model: nn.Module, forward: Callable[[], Any]) -> Tensor:
    """The mean error of the layers that are planned in a forward of an attached model: 0-d, float32.

    Differentiable in what the method has learned, unless gradients are off; then a choice through which no gradient
    passes is made as it will be, not softly. 0 without a gradient where nothing is planned.
    """
    attachment = attached(model)
    assert attachment is not None
    with _compared(attachment, learn=torch.is_grad_enabled()) as seen, torch.no_grad():
        forward()
    if not seen.errors:
        return torch.zeros((), device=next(model.parameters()).device)
    mean, layers = torch.stack(seen.errors).mean(), len(seen.errors)
    if not seen.gradients:
        return mean
    gradients = [gradient / layers for gradient in seen.gradients.values()]
    out: Tensor = _Known.apply(mean, gradients, *seen.gradients)  # type: ignore[no-untyped-call]  # torch's
    return out


class _Compared(Session):
    """Stands before a session: gives dense attention, and keeps how far the session's own is from it."""

    def __init__(self, session: Session, learn: bool) -> None:
        super().__init__(session.method, schedule=session.schedule, kernel=session.kernel)
        self.behind, self.learn = session, learn
        self.errors: list[Tensor] = []
        self.gradients: dict[nn.Parameter, Tensor] = {}

    def refuse_compiled_training(self, seat: Seat) -> NoReturn:
        raise MethodError(f"{self.method.name} is fitted to dense attention in eager mode alone, not compiled")

    def attend(
        self,
        seat: Seat,
        q_BSHD: Tensor,
        k_BSHD: Tensor,
        v_BSHD: Tensor,
        *,
        grid: Grid | None,
        dense: DenseBackend,
        mask: Tensor | None = None,
        scale: float | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, bool]:
        q, k, v = (x.detach() for x in (q_BSHD, k_BSHD, v_BSHD))
        shown = None if hidden is None else hidden.detach()
        with torch.set_grad_enabled(self.learn):
            out, planned = self.behind.attend(
                seat, q, k, v, grid=grid, dense=dense, mask=mask, scale=scale, hidden=shown
            )
        if not planned:
            return out, False
        wanted = dense.run(q, k, v, mask, scale)
        with torch.set_grad_enabled(self.learn):
            self._keep(seat, _relative(out, wanted, valid_keys(mask, len(q))))
        return wanted, False

    def _keep(self, seat: Seat, error: Tensor) -> None:
        """The error of a layer, and its gradient."""
        self.errors.append(error.detach())
        branch = self.behind.trained.of(seat.model, seat.layer)
        if not error.requires_grad or branch is None:
            return
        parameters = [parameter for parameter in branch.parameters() if parameter.requires_grad]
        gradients = torch.autograd.grad(error, parameters, materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            known = self.gradients.get(parameter)
            self.gradients[parameter] = gradient if known is None else known + gradient


class _Known(torch.autograd.Function):
    """A value whose gradients have been taken before."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return None, None, *(grads[0] * gradient for gradient in ctx.gradients)


@contextmanager
def _compared(attachment: Attachment, *, learn: bool) -> Iterator[_Compared]:
    """The model's layers lead to a comparison, and their branches are being fitted if they are to learn."""
    seen = _Compared(attachment.session, learn)
    branches = [module for module in attachment.session.trained.modules.modules() if isinstance(module, Branch)]
    before = [(mark, mark.slot) for mark in attachment.marks]
    try:
        for mark, slot in before:
            mark.slot = mark.attn._falloff_slot = op.Slot(seen, slot.seat, slot.dense, slot.scene)
        for branch in branches:
            branch.fitting = learn
        yield seen
    finally:
        for mark, slot in before:
            mark.slot = mark.attn._falloff_slot = slot
        for branch in branches:
            branch.fitting = False


def _relative(out_BSHD: Tensor, wanted_BSHD: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Energy of the difference over that of what is wanted, of tokens that are no padding: 0-d, float32."""
    out, wanted = out_BSHD.float(), wanted_BSHD.float()
    if valid_BS is not None:
        out, wanted = (x.masked_fill(~valid_BS[..., None, None], 0) for x in (out, wanted))
    return (out - wanted).square().sum() / wanted.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
