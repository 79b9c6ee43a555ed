"""Linear attention over the blocks of a plan: what SLA (arXiv:2509.24006) adds to its sparse part.

With feature maps X = phi(Q) and Y = phi(K) of c channels that are nowhere negative, block j of the keys is told by

    h_j = Y_j^T V_j  [c, d]        z_j = Y_j^T 1  [c]

and the queries of block i, over a set Z_i of key blocks, are given

    O_i = X_i sum_{j in Z_i} h_j / (X_i sum_{j in Z_i} z_j + eps),

a mean of values whose cost grows with the tokens, not with their square. The sums over Z_i are one product of a
matrix of zeros and ones with all the states: about c / (2 bq bk) of what dense attention costs, and free of the
cancellation of totals from which the other blocks are taken.

There are two that compute it: PyTorch's operators on any device, with sums and states of float32 at least, which is
the specification, and Triton kernels on CUDA devices (``triton_linear``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from falloff.kernels import proof, triton, triton_linear
from falloff.kernels.blocks import Blocks, kv_blocks, q_blocks
from falloff.kernels.errors import UnsupportedError
from falloff.kernels.groups import Group, groups_within, of_group
from falloff.kernels.needs import Needs, differentiable
from falloff.kernels.trial import Trial
from falloff.kernels.triton_linear import LEAST
from falloff.plan import Plan

Over = Literal["marginal", "complement", "all"]
Features = Literal["softmax", "elu", "relu"]
"""Feature maps phi of unscaled queries and keys: softmax over a head's channels, elu (+ 1) or relu."""
Impl = Literal["auto", "torch", "triton"]
Phi = Callable[[Tensor], Tensor]
Named = dict[str, Tensor]
WORKING_BYTES = 256 << 20
"""Held at once beside queries, keys, values and results."""
TOLERANCE = 5e-2
"""Relative error of a trial of the Triton kernels: above bfloat16's, far below what a wrong sum does."""
SMOOTHING = 1e-5
"""The eps of linear attention over all keys, as in SLA's later code; without effect on a query that keys answer."""


def _softmax(x: Tensor) -> Tensor:
    return x.softmax(-1)


def _elu(x: Tensor) -> Tensor:
    return F.elu(x) + 1


PHI: Mapping[Features, Phi] = {"softmax": _softmax, "elu": _elu, "relu": F.relu}


class _Seen(NamedTuple):
    """Which key blocks a query block sums over, bool or their shares [B|1, H|1, Tq, Tk], and the blocks themselves."""

    marks: Tensor
    q: Blocks
    kv: Blocks


def linear_attention(
    plan: Plan,
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    *,
    features: Features,
    over: Over | Tensor,
    key_valid: Tensor | None = None,
    impl: Impl = "auto",
) -> tuple[Tensor, Tensor]:
    """Out [B, H, Nq, D] in the tensors' type, and its denominators [B, H, Nq], float32 at least. Differentiable.

    ``over``: the key blocks of Z_i, those that the plan neither computes nor drops ("marginal"), those that it does
    not compute ("complement"), or "all"; or the share that every block has in the sums, at least 0,
    [B|1, H|1, Tq, Tk]. ``key_valid`` bool [B, Nk] leaves keys out whatever they hold. A query with an empty Z_i gives 0
    and 0. For a gradient states are made again instead of kept. ``impl``: "auto" takes "triton" for what it can run on
    a CUDA device, else "torch".

    Raises ``UnsupportedError`` when "triton" is asked for and cannot run the call.
    """
    if impl != "torch":
        why = refuse_triton(plan, q_BHND, k_BHND, v_BHND, features, over)
        if impl == "triton" and why is not None:
            raise UnsupportedError(f"linear attention's kernel 'triton' cannot run this call: {why}")
        if why is None and (impl == "triton" or q_BHND.is_cuda) and not isinstance(over, Tensor):
            return _by_triton(plan, q_BHND, k_BHND, v_BHND, features, over, key_valid)
    return _by_torch(plan, q_BHND, k_BHND, v_BHND, features, over, key_valid)


def _by_triton(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, features: Features, over: Over, key_valid: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    marks, eps = (None, SMOOTHING) if over == "all" else (_left_over(plan, over), 0.0)
    return triton_linear.linear_attention(plan, marks, q, k, v, features=features, eps=eps, key_valid=key_valid)


def _by_torch(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    features: Features,
    over: Over | Tensor,
    key_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    shares = (over,) if isinstance(over, Tensor) else ()
    seen = None if over == "all" else _seen(plan, over)
    batch, heads, _, head_dim = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    results = []
    for group in groups_within(batch, heads, _head_bytes(plan, head_dim, wide), WORKING_BYTES):
        valid = None if key_valid is None else key_valid[group[0]]
        run = partial(_attention, PHI[features], seen, group, valid)
        tensors = (q[group], k[group], v[group])
        if differentiable(*tensors, *shares):
            results.append(checkpoint(run, *tensors, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(run(*tensors))
    out, denominators = (torch.cat(parts) for parts in zip(*results, strict=True))
    return out.view(batch, heads, -1, head_dim), denominators.view(batch, heads, -1)


def refuse_triton(plan: Plan, q: Tensor, k: Tensor, v: Tensor, features: Features, over: Over | Tensor) -> str | None:
    """Why the Triton kernels cannot run a call; ``None`` where they can."""
    if isinstance(over, Tensor):
        return "it sums whole blocks, not shares of them"
    why = triton.absent() or triton.refuse_tensors(q)
    if why is not None or triton.interpreting():  # which compiles nothing that could be wrong
        return why
    return _fault(Trial.like(Needs(plan, q, grad=differentiable(q, k, v), lse=False)), features, over)


@cache
def _fault(trial: Trial, features: Features, over: Over) -> str | None:
    """Why the Triton kernels, as compiled on this machine, are not believed for calls like a trial."""

    def compare() -> str | None:
        got, expected = (_answer(attend, trial, features, over) for attend in (_by_triton, _by_torch))
        return proof.difference(got, expected, TOLERANCE)

    return proof.tried(compare, trial.device)


def _answer(attend: Callable[..., tuple[Tensor, Tensor]], trial: Trial, features: Features, over: Over) -> Named:
    """All that one of the two answers in a trial, by name."""
    plan = trial.plans()[0]
    inputs = [x.requires_grad_(trial.grad) for x in trial.tensors(plan)]
    out, denominators = attend(plan, *inputs, features, over)
    answer = {"output": out.detach(), "denominators": denominators.detach()}
    if trial.grad:
        grads = torch.autograd.grad(out.float().square().sum() + denominators.sum(), inputs)
        answer |= {f"gradient of {name}": grad for name, grad in zip("qkv", grads, strict=True)}
    return answer


def _attention(
    features: Phi, seen: _Seen | None, group: Group, valid_N: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """Of a few heads: out [H, N, D] and the denominators [H, N]."""
    dtype, wide = v.dtype, torch.promote_types(q.dtype, torch.float32)
    q, k, v = q.to(wide), k.to(wide), v.to(wide)
    if valid_N is not None:  # 0 * NaN would leak otherwise
        k, v = (x.masked_fill(~valid_N[:, None], 0) for x in (k, v))
    x, y = features(q), features(k)
    if valid_N is not None:
        y = y.masked_fill(~valid_N[:, None], 0)
    v1 = torch.cat([v, torch.ones_like(v[..., :1])], -1)
    sums = x @ (y.mT @ v1) if seen is None else _over_blocks(seen, group, x, y, v1)
    values, weight = sums[..., :-1], sums[..., -1:]
    empty = weight <= LEAST
    eps = SMOOTHING if seen is None else 0.0
    out = values * (weight + eps).masked_fill(empty, torch.inf).reciprocal()
    return out.to(dtype), weight.masked_fill(empty, 0)[..., 0]


def _over_blocks(seen: _Seen, group: Group, x: Tensor, y: Tensor, v1: Tensor) -> Tensor:
    """``X_i sum_{j in Z_i} Y_j^T v1_j`` for every query, [H, Nq, D + 1]."""
    states = seen.kv.split(y, group).mT @ seen.kv.split(v1, group)
    marks = of_group(seen.marks, group).to(states.dtype)
    summed = (marks @ states.flatten(2)).view(len(x), -1, *states.shape[2:])
    return seen.q.join(seen.q.split(x, group) @ summed, group)


def _seen(plan: Plan, over: Over | Tensor) -> _Seen:
    marks = over if isinstance(over, Tensor) else _left_over(plan, over)
    return _Seen(marks, q_blocks(plan), kv_blocks(plan))


def _left_over(plan: Plan, over: Over) -> Tensor:
    """The blocks of "marginal" or "complement", bool [B|1, H|1, Tq, Tk]."""
    listed = plan.blocks.dense()
    if over == "marginal" and plan.dropped is not None:
        listed = listed | plan.dropped.dense()
    return ~listed


def _head_bytes(plan: Plan, head_dim: int, dtype: torch.dtype) -> int:
    """Of one head: its states twice, and about six copies of its tokens."""
    states = (plan.blocks.shape[2] + plan.blocks.shape[3]) * head_dim
    tokens = 3 * (plan.q_len + plan.kv_len)
    return dtype.itemsize * (head_dim + 1) * (states + tokens)
