"""An attached model under a training's hand: where its forwards stand, dense for a while, or by other settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from falloff.hosts.diffusers import attached
from falloff.methods.base import Method
from falloff.session import Position


@contextmanager
def standing(model: nn.Module, position: Position) -> Iterator[None]:
    """Forwards by hand stand here, each as a run of its own; for training, where a noise level is a step.

    What a method kept in a forward is gone after it, so that a layer computed again for its gradient is planned as it
    was the first time. Does nothing to a model without falloff.
    """
    attachment = attached(model)
    if attachment is None:
        yield
        return
    attachment.watch.told = position
    try:
        yield
    finally:
        attachment.watch.told = None
        attachment.session.forget()


@contextmanager
def dense(model: nn.Module, reason: str) -> Iterator[None]:
    """All attention of a model is dense for a while. Does nothing to a model without falloff."""
    attachment = attached(model)
    if attachment is not None:
        attachment.stays_dense = reason
    try:
        yield
    finally:
        if attachment is not None:
            attachment.stays_dense = None


def replan(model: nn.Module, method: Method) -> None:
    """Go on with other settings of the method that is attached; what it has learned stays."""
    attachment = attached(model)
    assert attachment is not None
    attachment.session.replan(method)
