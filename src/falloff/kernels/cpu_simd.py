"""Block-sparse attention on CPUs in C++ of our own (simd/), compiled at its first use: forward and backward.

PyTorch's operators reach their speed on long rows of contiguous keys; blocks must be gathered for them and short rows
are dear. Here blocks are packed once a call and read in place, at the speed of dense attention.

Forward, over the tiles of keys j that a query sees, in base 2: ``m = max(m, s_j)``, ``o = o 2^(m_old - m) +
2^(s_j - m) v_j``; ``out = o / l`` and ``LSE = ln 2 (m + log2 l)``. Backward, with ``delta = rowsum(dO O)``:
``p = exp(s - LSE)``, ``dS = p (dO V^T - delta + dLSE)``, ``dQ = scale dS K``, ``dK = scale dS^T Q``, ``dV = p^T dO``
(Dao, 2023, "FlashAttention-2", section 3). No atomic sums: the same result whatever the threads.

A summary's means (summary.py) are further columns, with the log of what each stands for added to its scores. For a
gradient they are computed apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falloff.kernels import compiled, skip
from falloff.kernels.kept import kept
from falloff.kernels.needs import Needs, differentiable
from falloff.kernels.simd_call import Call, Strided, channels_together, side, starts
from falloff.kernels.summary import with_summary
from falloff.kernels.trial import Trial
from falloff.plan import BlockMap, Plan, Sizes

SOURCE = Path(__file__).parent / "simd" / "attention.cpp"
ROWS = 128
"""Queries of a tile in the C++; a block is left out for all of its queries or for none."""
FILLED = 0.5
"""Share of panels' columns that are keys, below which ``auto`` takes another kernel."""


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the reference, in float32 whatever the type. Differentiable through out and LSE."""
    q, k, v = (channels_together(x.float()) for x in (q_BHND, k_BHND, v_BHND))
    apart = plan.summary and differentiable(q, k, v)  # the C++ knows no gradient of means
    means = plan.summary and not apart
    out, lse = attend(Library(SOURCE), plan, q, k, v, scale, key_valid_BN, means=means)
    if apart:
        out, lse = with_summary(plan, q, k, v, scale, key_valid_BN, (out, lse))
    return out.to(q_BHND.dtype), lse


def absent() -> str | None:
    made = compiled.library(SOURCE)
    return str(made) if isinstance(made, compiled.CompileError) else None


def refuse(needs: Needs) -> str | None:
    if needs.q_BHND.device.type != "cpu":
        return f"it runs on CPUs, the tensors are on {needs.q_BHND.device}"
    if needs.q_BHND.dtype == torch.float64:
        return "it computes in float32, the tensors are torch.float64"
    if needs.plan.skip is not None and not _skips(needs.plan.q_sizes):
        return f"to leave blocks out while it computes it needs query blocks of one size of at most {ROWS} tokens"
    return None


def unsuited(needs: Needs) -> str | None:
    return unfilled(needs.plan, SOURCE)


def unfilled(plan: Plan, source: Path) -> str | None:
    """Panels hold keys of one block alone: where most of their columns stay empty, gathered keys are faster."""
    sizes = plan.kv_sizes
    share = _filled(torch.tensor([sizes]) if isinstance(sizes, int) else sizes, compiled.width(source))
    return None if share >= FILLED else f"its panels would be {share:.0%} full, since blocks of keys are small"


def _filled(sizes: Tensor, width: int) -> float:
    return float(sizes.sum() / (-(-sizes // width) * width).sum())


def _skips(q_sizes: Sizes) -> bool:
    return isinstance(q_sizes, int) and q_sizes <= ROWS


def trial() -> Trial:
    return Trial(torch.device("cpu"), torch.float32, 64, 128, 128)


class Lists(NamedTuple):
    """What a direction (rows and columns of a map) asks of a plan.

    ``first``: where blocks of rows and of columns start, int64 [B|1, H|1, T + 1]. ``at``: the panel where each block of
    columns starts, as wide as ``first``; ``panels`` of a head.
    """

    blocks: BlockMap
    first: tuple[Tensor, Tensor]
    at: Tensor
    panels: int


def lists(plan: Plan, width: int, *, by_keys: bool) -> Lists:
    """The lists of queries that see keys, or of keys that are seen by queries, for panels of ``width`` columns."""
    blocks = plan.blocks.transposed if by_keys else plan.blocks
    sizes = plan.q_sizes_BHT(), plan.kv_sizes_BHT()
    rows, columns = reversed(sizes) if by_keys else sizes
    at = starts(-(-columns // width))
    return Lists(blocks, (starts(rows), starts(columns)), at, int(at[..., -1].max()))


def tasks(plan: Plan, batch: int, heads: int) -> Tensor:
    """(Batch entry, head, block of queries) as one number, int64: the longest first, so that threads end together."""
    pairs = plan.blocks.tokens(plan.kv_sizes_BHT()).view(plan.blocks.shape[:3])
    work = (pairs * plan.q_sizes_BHT()).expand(batch, heads, -1).flatten()
    return work.argsort(descending=True, stable=True)


class Library(NamedTuple):
    """Which C++ computes, and of how many bfloat16 a number is made there, if it matters."""

    source: Path
    parts: int = 0


def attend(
    library: Library,
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    key_valid_BN: Tensor | None,
    *,
    means: bool = False,
) -> tuple[Tensor, Tensor]:
    """Out [B, H, N, D] and LSE [B, H, N] of float32 tensors whose channels lie together; differentiable."""
    both: tuple[Tensor, Tensor] = _Attention.apply(library, plan, scale, key_valid_BN, means, q, k, v)  # type: ignore[no-untyped-call]  # torch's
    return both


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        plan: Plan,
        scale: float,
        valid: Tensor | None,
        means: bool,
        q: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3])
        tensors = {"q": q, "k": k, "v": v, "out": out, "lse": lse}
        _launch(library, "falloff_forward", plan, scale, valid, tensors, means=means)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.library, ctx.plan, ctx.scale, ctx.valid = library, plan, scale, valid
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if d_out is None and d_lse is None:
            return (None,) * 8
        d_out = torch.zeros_like(out) if d_out is None else channels_together(d_out)
        shift = (d_out * out).sum(-1)
        if d_lse is not None:
            shift = shift - d_lse
        given = {"q": q, "k": k, "v": v, "d_out": d_out, "lse": lse, "shift": shift}
        grads = {f"d_{name}": torch.zeros_like(x) for name, x in zip("qkv", (q, k, v), strict=True)}
        _launch(ctx.library, "falloff_backward", ctx.plan, ctx.scale, ctx.valid, given | grads, by_keys=True)
        return None, None, None, None, None, *grads.values()


def _launch(
    library: Library,
    name: str,
    plan: Plan,
    scale: float,
    valid: Tensor | None,
    tensors: dict[str, Tensor],
    *,
    means: bool = False,
    by_keys: bool = False,
) -> None:
    """Call the C++. Everything it reads is held by the names here until it returns."""
    batch, heads, _, channels = tensors["q"].shape
    width = compiled.width(library.source)
    read = kept(plan, ("cpu-simd", width, by_keys), lambda: lists(plan, width, by_keys=by_keys))
    valid = None if valid is None else valid.contiguous()
    orders = [None if order is None else order.contiguous() for order in (plan.q_order, plan.kv_order)]
    queries, keys = (
        side(order, first, blocks, tokens)
        for order, first, blocks, tokens in zip(
            orders,
            reversed(read.first) if by_keys else read.first,
            plan.blocks.shape[2:],
            (plan.q_len, plan.kv_len),
            strict=True,
        )
    )
    keys.valid = None if valid is None else valid.data_ptr()
    call = Call(batch=batch, heads=heads, channels=channels, panels=read.panels, scale=scale)
    call.skip, call.protect = -1 if plan.skip is None else plan.skip, skip.PROTECTED
    call.summary, call.parts = means, library.parts
    call.rows, call.columns = (keys, queries) if by_keys else (queries, keys)
    if not by_keys:  # gradients are made head by head
        task = kept(plan, ("cpu-simd", batch, heads), lambda: tasks(plan, batch, heads))
        call.tasks, call.task = task.numel(), task.data_ptr()
    call.threads = _threads(plan, batch, heads, channels)
    call.start, call.list, call.at = (x.data_ptr() for x in (read.blocks.start, read.blocks.columns, read.at))
    map_batch, map_heads = plan.blocks.shape[:2]
    call.map_batch, call.map_head = (0 if map_batch == 1 else map_heads), (0 if map_heads == 1 else 1)
    for key, x in tensors.items():
        setattr(call, key, Strided(x.data_ptr(), *x.stride()[:3]))
    compiled.call(library.source, name, call)


def _threads(plan: Plan, batch: int, heads: int, channels: int) -> int:
    maps = plan.blocks.shape[0] * plan.blocks.shape[1]
    work = plan.pairs * batch * heads // maps * channels
    return compiled.threads(work)
