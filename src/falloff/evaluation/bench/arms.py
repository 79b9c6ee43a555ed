"""The arms of an attention benchmark: dense peers, our kernels on the map, and our kernels with every block on."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from falloff import kernels
from falloff.evaluation.bench import dense
from falloff.evaluation.bench.memory import fits, gigabytes
from falloff.evaluation.bench.timing import Arm
from falloff.plan import Plan, dense_plan

NO_PEER = ("cpu", "reference")
"""Kernels not measured with every block on: the first is torch's own operator then, the second has no speed."""
REFERENCE_BYTES = 24
"""Memory of the reference for one pair of tokens and one head: mask, scores and weights."""


class Inputs(NamedTuple):
    """One call [1, H, N, D], in the layout that pipelines hand over: views of [1, N, H, D].

    ``d_out``: the gradient of the output, where the backward is measured; q, k and v are leaves that require one.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor | None = None

    @staticmethod
    def random(
        heads: int, tokens: int, head_dim: int, *, dtype: torch.dtype, device: torch.device, backward: bool
    ) -> Inputs:
        generator = torch.Generator(device).manual_seed(0)

        def draw(needs_grad: bool) -> Tensor:
            x = torch.randn(1, tokens, heads, head_dim, dtype=dtype, device=device, generator=generator)
            return x.transpose(1, 2).detach().requires_grad_(needs_grad)

        q, k, v = (draw(backward) for _ in range(3))
        return Inputs(q, k, v, draw(False) if backward else None)


class Arms(NamedTuple):
    """Arms that may run, and why others cannot."""

    arms: dict[str, Arm]
    refused: dict[str, str]


def arm(attend: dense.Attend, inputs: Inputs) -> Arm:
    """Attention of the inputs, and its gradients where they are wanted."""
    q, k, v, d_out = inputs
    forward = partial(attend, q, k, v)
    return Arm(forward) if d_out is None else Arm(forward, lambda out: torch.autograd.grad(out, (q, k, v), d_out))


def dense_arms(inputs: Inputs, names: Iterable[str]) -> Arms:
    """Dense attention that is present, and the named kernels with every block on."""
    able, refused = dense.peers(inputs.q.device)
    length = inputs.q.shape[2]
    everything = dense_plan(length, length).to(inputs.q.device)
    for name in names:
        if name in NO_PEER:
            continue
        reason = refusal(everything, inputs, name)
        if reason is None:
            able[f"dense {name}"] = on_plan(everything, name)
        else:
            refused[f"dense {name}"] = reason
    return Arms({name: arm(attend, inputs) for name, attend in able.items()}, refused)


def sparse_arms(plan: Plan, inputs: Inputs, names: Iterable[str]) -> Arms:
    """The named kernels on a plan."""
    reasons = {name: refusal(plan, inputs, name) for name in names}
    return Arms(
        {name: arm(on_plan(plan, name), inputs) for name, why in reasons.items() if why is None},
        {name: why for name, why in reasons.items() if why is not None},
    )


def refusal(plan: Plan, inputs: Inputs, name: str) -> str | None:
    """Why a kernel cannot run a plan on these inputs."""
    q = inputs.q
    try:
        kernels.choose(plan, q, impl=name, needs_grad=inputs.d_out is not None, needs_lse=False)
    except kernels.UnsupportedError as error:
        return str(error).removeprefix(f"kernel {name!r} cannot run this call: ")
    needed = REFERENCE_BYTES * q.shape[1] * plan.q_len * plan.kv_len
    if name == "reference" and not fits(needed, q.device):
        return f"its full mask and scores need about {gigabytes(needed)} of memory"
    return None


def on_plan(plan: Plan, name: str) -> dense.Attend:
    return lambda q, k, v: kernels.attend(plan, q, k, v, impl=name)
