"""Which kernel runs a call, and why not another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from falloff.kernels import cpu, reference
from falloff.kernels.errors import UnsupportedError
from falloff.plan import Plan

Attention = Callable[[Plan, Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]


class Need(NamedTuple):
    """What the caller wants besides the output."""

    grad: bool
    lse: bool


class Kernel(NamedTuple):
    """One way to run a plan. ``absent`` says why it cannot run on this machine, ``refuse`` why not this call."""

    name: str
    good_for: str
    attention: Attention
    absent: Callable[[], str | None]
    refuse: Callable[[Plan, Tensor, Need], str | None]


KERNELS = (
    Kernel("cpu", "CPUs, forward and backward", cpu.attention, cpu.absent, lambda plan, q, need: cpu.refuse(q)),
    Kernel(
        "reference",
        "any device and dtype; memory grows with the square of the tokens",
        reference.attention,
        lambda: None,
        lambda plan, q, need: None,
    ),
)
"""In the order of preference of ``auto``."""


@dataclass(frozen=True)
class Choice:
    """The kernel picked for a call; ``skipped`` holds (name, reason) of every other."""

    name: str
    reason: str
    skipped: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {self.reason}", *(f"  not {name}: {why}" for name, why in self.skipped)])


def choose(
    plan: Plan, q_BHND: Tensor, *, impl: str = "auto", needs_grad: bool = False, needs_lse: bool = True
) -> Choice:
    """Pick the kernel for a call. ``auto`` takes the first that can run it, in the order of ``KERNELS``.

    Raises ``UnsupportedError`` when ``impl`` names a kernel that is unknown or cannot run this call.
    """
    need = Need(needs_grad, needs_lse)
    refusals = {kernel.name: kernel.absent() or kernel.refuse(plan, q_BHND, need) for kernel in KERNELS}
    if impl == "auto":
        name = next(name for name, why in refusals.items() if why is None)
        reason = f"first that can run this call ({kernel_named(name).good_for})"
    else:
        why = kernel_named(impl).name and refusals[impl]
        if why is not None:
            raise UnsupportedError(f"kernel {impl!r} cannot run this call: {why}")
        name, reason = impl, "asked for by name"
    skipped = tuple((other, why or f"{name} comes first") for other, why in refusals.items() if other != name)
    return Choice(name, reason, skipped)


def kernel_named(name: str) -> Kernel:
    for kernel in KERNELS:
        if kernel.name == name:
            return kernel
    known = ", ".join(kernel.name for kernel in KERNELS)
    raise UnsupportedError(f"unknown kernel {name!r}; choose auto or one of {known}")


def available() -> list[tuple[str, bool, str]]:
    """(name, can it run on this machine, why) of every kernel."""
    reasons = [(kernel, kernel.absent()) for kernel in KERNELS]
    return [(kernel.name, why is None, why or kernel.good_for) for kernel, why in reasons]
