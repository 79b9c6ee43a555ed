"""Which kernel runs a call, and why not another."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from falloff.kernels import cpu, cpu_amx, cpu_simd, cpu_tile, proof, reference, triton
from falloff.kernels.errors import UnsupportedError
from falloff.kernels.kernel import Kernel
from falloff.kernels.needs import Needs
from falloff.kernels.vendor import VENDOR
from falloff.plan import Plan

OWN = (
    Kernel(
        "cpu-amx",
        "Intel CPUs with AMX and a C++ compiler, forward and backward",
        cpu_amx.attention,
        cpu_amx.absent,
        cpu_amx.refuse,
        unsuited=cpu_amx.unsuited,
        trial=cpu_amx.trial,
    ),
    Kernel(
        "cpu-tile",
        "bfloat16 inference on CPUs that multiply bfloat16",
        cpu_tile.attention,
        cpu_tile.absent,
        cpu_tile.refuse,
        rough_lse=True,
        unsuited=cpu_tile.unsuited,
    ),
    Kernel(
        "cpu-simd",
        "CPUs with a C++ compiler, forward and backward in float32",
        cpu_simd.attention,
        cpu_simd.absent,
        cpu_simd.refuse,
        summarises=True,
        skips=True,
        unsuited=cpu_simd.unsuited,
        trial=cpu_simd.trial,
    ),
    Kernel("cpu", "CPUs, forward and backward", cpu.attention, lambda: None, cpu.refuse, skips=True),
    Kernel(
        "triton",
        "NVIDIA GPUs, forward and backward",
        triton.attention,
        triton.absent,
        triton.refuse,
        skips=True,
        trial=None if triton.interpreting() else triton.trial,  # the interpreter compiles nothing
    ),
    Kernel(
        "reference",
        "any device; memory grows with the square of the tokens",
        reference.attention,
        lambda: None,
        lambda needs: None,
        summarises=True,
        skips=True,
    ),
)
KERNELS = (*OWN, *VENDOR)
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
    refusals = {kernel.name: _refusal(kernel, needs, named=kernel.name == impl) for kernel in KERNELS}
    if impl == "auto":
        rough = {kernel.name: "its LSE is rough, and the call needs one" for kernel in KERNELS if kernel.rough_lse}
        refusals = {name: why or (rough.get(name) if needs_lse else None) for name, why in refusals.items()}
        refusals = {name: why or kernel_named(name).unsuited(needs) for name, why in refusals.items()}
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


def available(*, prove: bool = False) -> list[tuple[str, bool, str]]:
    """(name, can it run on this machine, why) of every kernel; with ``prove``, foreign ones are tried."""
    reasons = [(kernel, kernel.absent() or (_unproved(kernel) if prove else None)) for kernel in KERNELS]
    return [(kernel.name, why is None, why or _what(kernel)) for kernel, why in reasons]


def _refusal(kernel: Kernel, needs: Needs, *, named: bool) -> str | None:
    """Why a kernel does not run a call. One that ``auto`` never takes is looked into only when it is named."""
    if kernel.by_name is not None and not named:
        return kernel.by_name
    return kernel.absent() or _unskipping(kernel, needs) or kernel.refuse(needs) or proof.fault(kernel, needs)


def _unskipping(kernel: Kernel, needs: Needs) -> str | None:
    if needs.plan.skip is None or kernel.skips:
        return None
    return "it leaves no blocks out while it computes, and the plan has skip set"


def _unproved(kernel: Kernel) -> str | None:
    return None if kernel.trial is None else proof.verdict(kernel, kernel.trial())


def _what(kernel: Kernel) -> str:
    return kernel.good_for if kernel.by_name is None else f"{kernel.good_for}; {kernel.by_name}"
