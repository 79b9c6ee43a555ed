"""Maps, plans and whole calls for the tests of methods that learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from falloff import BlockMap, Plan, kernels
from falloff.methods.branch import Branch, Work


def plan_of(classes: Tensor, q_len: int, kv_len: int, q_sizes: int | Tensor, kv_sizes: int | Tensor) -> Plan:
    """A plan from classes [..., Tq, Tk]: 1 computed, 0 left to the branch, -1 dropped."""
    return Plan(
        q_len=q_len,
        kv_len=kv_len,
        q_sizes=q_sizes,
        kv_sizes=kv_sizes,
        blocks=BlockMap.from_dense(classes == 1),
        dropped=BlockMap.from_dense(classes == -1),
        partial=True,
    )


def random_classes(seed: int, *shape: int) -> Tensor:
    """At least one block of every row is computed."""
    classes = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed))
    classes[..., 0] = 1
    return classes


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(
    branch: Branch, plan: Plan, q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, impl: str = "reference"
) -> Tensor:
    """The output of one call, [B, H, N, D]."""
    out = kernels.attend(plan, q, k, v, key_valid=valid, impl=impl)
    work = Work(
        plan=plan,
        q_BHND=q,
        k_BHND=k,
        v_BHND=v,
        out_BHND=out,
        scale=q.shape[-1] ** -0.5,
        key_valid_BN=valid,
    )
    result = branch(work)
    assert isinstance(result, Tensor)
    return result


def token_classes(classes: Tensor, q_sizes: Sequence[int], kv_sizes: Sequence[int]) -> Tensor:
    """Classes of pairs of tokens [..., Nq, Nk]."""
    rows = classes.repeat_interleave(torch.tensor(q_sizes), -2)
    return rows.repeat_interleave(torch.tensor(kv_sizes), -1)
