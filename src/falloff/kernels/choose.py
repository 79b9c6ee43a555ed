"""Which kernel runs a call, and why not another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from falloff.kernels import cpu, cpu_tile, reference, triton
from falloff.kernels.errors import UnsupportedError
from falloff.kernels.needs import Needs
from falloff.plan import Plan

Attention = Callable[[Plan, Tensor, Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]


class Kernel(NamedTuple):
    """One way to run a plan. ``absent`` says why it cannot run on this machine, ``refuse`` why not this call.

    ``rough_lse``: its LSE is no more exact than bfloat16 scores allow; ``auto`` then leaves it to calls without one.
    """

    name: str
    good_for: str
    attention: Attention
    absent: Callable[[], str | None]
    refuse: Callable[[Needs], str | None]
    rough_lse: bool = False


KERNELS = (
    Kernel(
        "cpu-tile",
        "bfloat16 inference on CPUs that multiply bfloat16",
        cpu_tile.attention,
        cpu_tile.absent,
        cpu_tile.refuse,
        rough_lse=True,
    ),
    Kernel("cpu", "CPUs, forward and backward", cpu.attention, lambda: None, cpu.refuse),
    Kernel("triton", "NVIDIA GPUs, forward and backward", triton.attention, triton.absent, triton.refuse),
    Kernel(
        "reference",
        "any device; memory grows with the square of the tokens",
        reference.attention,
        lambda: None,
        lambda needs: None,
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
    plan: Plan,
    q_BHND: Tensor,
    *,
    impl: str = "auto",
    needs_grad: bool = False,
    needs_lse: bool = True,
    drops_keys: bool = False,
) -> Choice:
    """Pick the kernel for a call. ``auto`` takes the first that can run it, in the order of ``KERNELS``.

    Raises ``UnsupportedError`` when ``impl`` names a kernel that is unknown or cannot run this call.
    """
    needs = Needs(plan, q_BHND, grad=needs_grad, lse=needs_lse, drops_keys=drops_keys)
    refusals = {kernel.name: kernel.absent() or kernel.refuse(needs) for kernel in KERNELS}
    if impl == "auto":
        rough = {kernel.name: "its LSE is rough, and the call needs one" for kernel in KERNELS if kernel.rough_lse}
        refusals = {name: why or (rough.get(name) if needs_lse else None) for name, why in refusals.items()}
        name = next(name for name, why in refusals.items() if why is None)
        reason = f"the first that can run this call ({kernel_named(name).good_for})"
    else:
        name, reason = kernel_named(impl).name, "asked for by name"
        if refusals[name] is not None:
            raise UnsupportedError(f"kernel {name!r} cannot run this call: {refusals[name]}")
    skipped = tuple((other, why or f"{name} was preferred") for other, why in refusals.items() if other != name)
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
