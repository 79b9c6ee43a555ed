"""Kernels of others, and those that a compiler makes on this machine, run only after they have been seen to agree with
the reference, once in a process.

What their documentation promises is not enough: block lists have been ignored without a word, and the answer was
dense attention. Tried is what the call at hand asks for (type, head size, blocks, maps, gradients), on tiny tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cache, partial

import torch
from torch import Tensor

from falloff.kernels import reference
from falloff.kernels.kernel import Attention, Kernel
from falloff.kernels.needs import Needs
from falloff.kernels.trial import Trial
from falloff.plan import Plan

LSE_TOLERANCE = 2e-2  # absolute, natural logarithm: a base of 2 is off by more


def fault(kernel: Kernel, needs: Needs) -> str | None:
    """Why a kernel is not believed for a call; ``None`` for one that needs no trial or has passed it."""
    return None if kernel.trial is None else verdict(kernel, Trial.like(needs))


@cache
def verdict(kernel: Kernel, trial: Trial) -> str | None:
    """Run a trial once in a process; ``None`` when it is passed, else what went wrong."""
    return tried(partial(_compare, kernel, trial), trial.device)


def tried(compare: Callable[[], str | None], device: torch.device) -> str | None:
    """What a comparison on a device finds wrong, be it that it fails.

    In a thread of its own, which knows nothing of the caller's autocast and inference mode, nor of the hooks by which
    gradient checkpointing counts saved tensors.
    """

    def guarded() -> str | None:
        try:
            with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
                return compare()
        except Exception as error:  # a kernel that is not ours may fail in any way: it is not believed then
            return f"its trial failed: {type(error).__name__}: {_first_line(error)}"

    with ThreadPoolExecutor(1) as apart:
        return apart.submit(guarded).result()


def _compare(kernel: Kernel, trial: Trial) -> str | None:
    answers = []
    for plan in trial.plans():
        got = _answer(kernel.attention, plan, trial)
        expected = _answer(reference.attention, plan, trial)
        answers.append((got, expected))
    (first, _), (second, _) = answers
    if torch.equal(first["output"], second["output"]):
        return "it gave one output for two different maps: it does not read them"
    for got, expected in answers:
        if (why := difference(got, expected, kernel.tolerance)) is not None:
            return why
    return None


def _answer(attention: Attention, plan: Plan, trial: Trial) -> dict[str, Tensor]:
    """All that a kernel answers in a trial, by name."""
    q, k, v = (x.requires_grad_(trial.grad) for x in trial.tensors(plan))
    with torch.set_grad_enabled(trial.grad):
        out, lse = attention(plan, q, k, v, trial.head_dim**-0.5, None)
    answer = {"output": out.detach()}
    if trial.lse:
        assert lse is not None  # else the kernel should have refused
        answer["LSE"] = lse.detach()
    if trial.grad:
        total = out.float().square().sum()
        if trial.lse and lse is not None:
            total = total + lse.masked_fill(lse.isinf(), 0).sum()
        grads = torch.autograd.grad(total, (q, k, v))
        answer |= {f"gradient of {name}": grad for name, grad in zip("qkv", grads, strict=True)}
    return answer


def difference(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> str | None:
    """What of the answers differs by more than it may."""
    for name, want in expected.items():
        have = got[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            return f"its {name} is {have.dtype} {tuple(have.shape)}, expected {want.dtype} {tuple(want.shape)}"
        if name == "LSE":
            off = (have - want).masked_fill((have == want), 0).abs().max()  # equal infinities differ by NaN
            allowed = LSE_TOLERANCE
        else:
            off, allowed = (have.float() - want.float()).norm() / want.float().norm(), tolerance
        if not off <= allowed:  # NaN is off too
            return f"its {name} is off by {float(off):.2g}, at most {allowed:.2g} is allowed"
    return None


def _first_line(error: Exception) -> str:
    """The next one too where the first only announces it, as PyTorch's compiler does."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return " ".join(line.strip() for line in lines[: 2 if lines and lines[0].endswith(":") else 1])
