"""Block-sparse attention of the cuDNN frontend, forward and backward on Hopper, forward also on Blackwell.

It checks no block ids; a plan has. Its backward is a function apart and knows no gradient of the LSE. Source:
github.com/NVIDIA/cudnn-frontend, python/cudnn/block_sparse_attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from falloff.kernels.kept import kept
from falloff.kernels.kernel import Kernel
from falloff.kernels.needs import Needs
from falloff.kernels.trial import Trial
from falloff.kernels.vendor import probe
from falloff.kernels.vendor.lists import from_order, in_order, lists, refined
from falloff.plan import Plan

BLACKWELL = (100, 103, 110)
CONSUMER = (120, 121)
ARCHS = (90, *BLACKWELL, *CONSUMER)


class Sparse(NamedTuple):
    """What the library reads: blocks of ``block`` tokens; ids int32 [B, H, Tq, width], counts int32 [B, H, Tq].

    ``sizes`` int32 [Tk]: tokens of each key block, where the last is shorter. ``empty``: some counts may be 0.
    """

    block: int
    ids: Tensor
    counts: Tensor
    sizes: Tensor | None
    empty: bool


def attention(
    plan: Plan, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, scale: float, key_valid_BN: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    batch, heads = q_BHND.shape[:2]
    given = kept(plan, ("cudnn", batch, heads), lambda: sparse(plan, batch, heads))
    q = F.pad(in_order(q_BHND, plan.q_order), (0, 0, 0, -plan.q_len % given.block))  # whole blocks of queries only
    k, v = (in_order(x, plan.kv_order) for x in (k_BHND, v_BHND))
    out, lse = _Attention.apply(scale, given, *(x.contiguous() for x in (q, k, v)))  # type: ignore[no-untyped-call]  # torch's own
    out, lse = out[:, :, : plan.q_len], lse[:, :, : plan.q_len]
    return from_order(out, plan.q_order), from_order(lse[..., None], plan.q_order).squeeze(-1)


def sparse(plan: Plan, batch: int, heads: int) -> Sparse:
    block = _block(plan)
    rows = lists(refined(plan, block, block))
    counts, ids = (x.expand(batch, heads, *x.shape[2:]).contiguous() for x in rows)
    sizes = None
    if plan.kv_len % block:
        starts = torch.arange(0, plan.kv_len, block, device=ids.device)
        sizes = (plan.kv_len - starts).clamp(max=block).to(torch.int32)
    return Sparse(block, ids, counts, sizes, plan.partial)


class _Attention(torch.autograd.Function):
    """q, k, v [B, H, N, D] with whole blocks of queries to out and LSE [B, H, Nq], natural logarithm."""

    @staticmethod
    def forward(ctx: Any, scale: float, given: Sparse, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        from cudnn import BSA

        result = BSA.block_sparse_attention_forward(
            q,
            k,
            v,
            given.ids,
            block_sizes=given.sizes,
            q2k_block_nums=given.counts,
            sparse_block_size=given.block,
            allow_empty_block_nums=given.empty,
            softmax_scale=scale,
            layout="bhsd",
        )
        out, lse = result["o_tensor"], result["lse_tensor"]
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.scale, ctx.given = scale, given
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from cudnn import BSA

        given: Sparse = ctx.given
        result = BSA.block_sparse_attention_backward(
            d_out.contiguous(),
            *ctx.saved_tensors,
            given.ids,
            block_sizes=given.sizes,
            q2k_block_nums=given.counts,
            sparse_block_size=given.block,
            softmax_scale=ctx.scale,
            layout="bhsd",
        )
        return None, None, result["dq_tensor"], result["dk_tensor"], result["dv_tensor"]


def absent() -> str | None:
    return probe.wrong_gpu(ARCHS) or probe.missing("cudnn", "pip install nvidia-cudnn-frontend")


def refuse(needs: Needs) -> str | None:
    why = probe.wrong_gpu(ARCHS, needs.q_BHND.device) or probe.wrong_blocks(needs, 64, 64)
    return why or _refuse_type(needs) or probe.unserved(needs, grad=True) or _refuse_grad(needs)


def trial() -> Trial:
    return Trial(torch.device("cuda"), torch.bfloat16, 128, 128, 128)


KERNEL = Kernel(
    "cudnn",
    "cuDNN frontend: forward and backward on Hopper and Blackwell, forward on consumer Blackwell",
    attention,
    absent,
    refuse,
    by_name=probe.BY_NAME,
    trial=trial,
)


def _block(plan: Plan) -> int:
    """The larger of its two block sizes that the plan's blocks can be cut into."""
    assert isinstance(plan.q_sizes, int)
    assert isinstance(plan.kv_sizes, int)
    return 128 if plan.q_sizes % 128 == plan.kv_sizes % 128 == 0 else 64


def _refuse_type(needs: Needs) -> str | None:
    have = probe.arch(needs.q_BHND.device)
    if have in CONSUMER:
        return probe.wrong_type(needs, probe.HALVES, (128,))
    if have in BLACKWELL and _block(needs.plan) == 64:
        return probe.wrong_type(needs, (torch.bfloat16,), (128,))
    return probe.wrong_type(needs, probe.HALVES, (64, 96, 128))


def _refuse_grad(needs: Needs) -> str | None:
    if not needs.grad:
        return None
    if needs.lse:
        return "its backward knows no gradient of the LSE"
    have = probe.arch(needs.q_BHND.device)
    if have in CONSUMER:
        return "it has no backward on this GPU"
    head_dims = (64, 128) if have in BLACKWELL and _block(needs.plan) == 128 else (128,)
    why = probe.wrong_type(needs, (torch.bfloat16,), head_dims)
    return why and f"for gradients, {why}"
