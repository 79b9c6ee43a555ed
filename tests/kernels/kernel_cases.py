"""Random plans and tensors for the kernel tests, all from one seeded generator."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from falloff.kernels import cpu_simd
from falloff.plan import BlockMap, Plan

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
"""A process in which the Triton kernel runs on the CPU, slowly: test_triton.py starts one."""
SINGLE = "triton" if INTERPRETING else os.environ.get("FALLOFF_TEST_KERNEL")
"""The kernel of a process that tests one in float32: test_triton.py and test_cpu_simd.py start such."""
IMPLS = (SINGLE,) if SINGLE else ("reference", "cpu")
"""Every kernel that runs here and is exact; a new one joins by its name."""
AUTO = "cpu" if cpu_simd.absent() else "cpu-simd"
"""What ``auto`` takes in float32 on this machine."""
EXACT = torch.float32 if SINGLE else torch.float64
TOLERANCE = 1e-5 if SINGLE else 1e-10


@dataclass(frozen=True)
class Case:
    plan: Plan
    q: Tensor
    k: Tensor
    v: Tensor
    key_valid: Tensor | None


def tensors(generator: torch.Generator, *shape: int, dtype: torch.dtype = EXACT) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=dtype)


def qkv(seed: int, batch: int, heads: int, q_len: int, kv_len: int, dim: int, dtype: torch.dtype = EXACT):
    generator = torch.Generator().manual_seed(seed)
    return tuple(tensors(generator, batch, heads, n, dim, dtype=dtype) for n in (q_len, kv_len, kv_len))


def uniform_plan(blocks: Tensor, q_len: int, kv_len: int, size: int, partial: bool = True) -> Plan:
    return Plan(
        q_len=q_len, kv_len=kv_len, q_sizes=size, kv_sizes=size, blocks=BlockMap.from_dense(blocks), partial=partial
    )


def random_map(seed: int, *shape: int, density: float = 0.4) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < density


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Odd lengths, shared or own maps, orders and sizes (zero included), dropped keys, queries that see nothing."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    most, sizes = (2, [7, 16, 64]) if INTERPRETING else (3, [1, 3, 8, 64])
    batch, heads = draw(st.integers(1, most)), draw(st.integers(1, most))
    maps = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads]))
    leads = st.sampled_from([(), (1, 1), (1, maps[1]), (maps[0], 1), maps])

    def side() -> tuple[int, int | Tensor, int, Tensor | None]:
        length = draw(st.integers(1, 40))
        order_lead = draw(st.none() | leads)
        order = None if order_lead is None else torch.rand(*order_lead, length, generator=generator).argsort(-1)
        if draw(st.booleans()):
            size = draw(st.sampled_from(sizes))
            return length, size, -(-length // size), order
        count, lead = draw(st.integers(1, 7)), draw(leads)
        cuts = torch.randint(0, length + 1, (*lead, count - 1), generator=generator).sort(-1).values
        ends = torch.cat([cuts, torch.full((*lead, 1), length)], -1)
        return length, ends.diff(prepend=torch.zeros(*lead, 1, dtype=torch.int64)), count, order

    q_len, q_sizes, q_blocks, q_order = side()
    kv_len, kv_sizes, kv_blocks, kv_order = side()
    blocks = torch.rand(*maps, q_blocks, kv_blocks, generator=generator) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    plan = Plan(
        q_len=q_len,
        kv_len=kv_len,
        q_sizes=q_sizes,
        kv_sizes=kv_sizes,
        blocks=BlockMap.from_dense(blocks),
        q_order=q_order,
        kv_order=kv_order,
        partial=True,
    )
    share = draw(st.none() | st.sampled_from([0.05, 0.7]))
    key_valid = None if share is None else torch.rand(batch, kv_len, generator=generator) < share
    dim = draw(st.sampled_from([1, 3, 32]))
    q, k, v = (tensors(generator, batch, heads, n, dim) for n in (q_len, kv_len, kv_len))
    return Case(plan, q, k, v, key_valid)
