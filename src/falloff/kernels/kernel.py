"""What a kernel tells of itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from falloff.kernels.needs import Needs
from falloff.kernels.trial import Trial
from falloff.plan import Plan

Attention = Callable[[Plan, Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor | None]]
"""Plan, q, k, v, scale, key_valid to out and LSE; no LSE only from a kernel that refuses calls in need of one."""


class Kernel(NamedTuple):
    """One way to run a plan. ``absent`` says why it cannot run on this machine, ``refuse`` why not this call.

    ``rough_lse``: its LSE is no more exact than bfloat16 scores allow; ``auto`` then leaves it to calls without one.
    ``summarises``: it runs a plan's summary itself; for others that is done above them. ``skips``: it can leave blocks
    out while it computes, as a plan's ``skip`` asks.
    ``unsuited``: why ``auto`` passes over it for a call that it can run.
    ``by_name``: why ``auto`` never takes it. ``trial``: for a kernel that is not ours, or that
    another compiler made here, the call that shows whether it can be believed on this machine; it is tried like that
    before its first use, and may be off by ``tolerance`` (relative).
    """

    name: str
    good_for: str
    attention: Attention
    absent: Callable[[], str | None]
    refuse: Callable[[Needs], str | None]
    rough_lse: bool = False
    summarises: bool = False
    skips: bool = False
    unsuited: Callable[[Needs], str | None] = lambda needs: None
    by_name: str | None = None
    trial: Callable[[], Trial] | None = None
    tolerance: float = 1e-2
