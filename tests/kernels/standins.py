"""Stand-ins for the libraries behind foreign kernels: their signatures and checks, and dense mathematics.

Each computes from the lists it is given, as the library reads them, so that a wrong conversion gives a wrong answer.
``dense=True`` makes one that ignores them.
"""

from __future__ import annotations

import math
from itertools import pairwise
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from falloff.kernels.vendor import probe


def module(name: str, **contents: Any) -> ModuleType:
    made = ModuleType(name)
    made.__dict__.update(contents)
    return made


def softmax(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] under a mask of tokens, to out in q's dtype and the LSE; nothing and -inf for empty rows."""
    scores = (scale * q.float() @ k.float().mT).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return (weights @ v.float()).to(q.dtype), scores.logsumexp(-1)


def listed(counts: Tensor, ids: Tensor, width: int) -> Tensor:
    """The map that counted lists of ids say, [..., rows, width]; ids beyond a count are not looked at."""
    assert counts.dtype == ids.dtype == torch.int32
    blocks = torch.zeros(*counts.shape, width, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        row = ids[(*index, slice(0, int(counts[tuple(index)])))].long()
        assert len(row.unique()) == len(row)
        blocks[(*index, row)] = True
    return blocks


def tokens(blocks: Tensor, sizes: tuple[int, int], q_len: int, kv_len: int) -> Tensor:
    return blocks.repeat_interleave(sizes[0], -2).repeat_interleave(sizes[1], -1)[..., :q_len, :kv_len]


def cudnn(*, dense: bool = False) -> dict[str, ModuleType]:
    def mask(q: Tensor, k: Tensor, ids: Tensor, counts: Tensor, sizes: Tensor | None, block: int) -> Tensor:
        assert q.is_contiguous()
        assert block in (64, 128)
        assert q.shape[2] % 64 == 0
        assert q.shape[3] in (64, 96, 128)
        assert q.dtype in (torch.float16, torch.bfloat16)
        width = -(-k.shape[2] // block)
        assert ids.shape[:3] == counts.shape == (*q.shape[:2], -(-q.shape[2] // block))
        assert ids.is_contiguous()
        assert counts.is_contiguous()
        blocks = listed(counts, ids, width)
        kept = tokens(torch.ones_like(blocks) if dense else blocks, (block, block), q.shape[2], width * block)
        sizes = torch.full((width,), block, dtype=torch.int32) if sizes is None else sizes
        assert (sizes.shape, sizes.dtype) == ((width,), torch.int32)
        valid = torch.arange(block) < sizes[:, None]
        assert int(sizes.sum()) == k.shape[2]  # else it would read beyond the end
        return (kept & valid.flatten())[..., : k.shape[2]]

    def forward(
        q_tensor: Tensor,
        k_tensor: Tensor,
        v_tensor: Tensor,
        q2k_block_index: Tensor,
        block_sparse_num: int | None = None,
        block_sizes: Tensor | None = None,
        q2k_block_nums: Tensor | None = None,
        *,
        sparse_block_size: int | None = None,
        allow_empty_block_nums: bool = False,
        softmax_scale: float | None = None,
        layout: str = "bhsd",
    ) -> dict[str, Tensor]:
        assert q2k_block_nums is not None
        assert softmax_scale is not None
        assert allow_empty_block_nums or bool((q2k_block_nums > 0).all())
        kept = mask(q_tensor, k_tensor, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size or 64)
        out, lse = softmax(q_tensor, k_tensor, v_tensor, kept, softmax_scale)
        return {"o_tensor": out, "lse_tensor": lse}

    def backward(
        do_tensor: Tensor,
        q_tensor: Tensor,
        k_tensor: Tensor,
        v_tensor: Tensor,
        o_tensor: Tensor,
        lse_tensor: Tensor,
        q2k_block_index: Tensor,
        block_sparse_num: int | None = None,
        block_sizes: Tensor | None = None,
        q2k_block_nums: Tensor | None = None,
        *,
        softmax_scale: float | None = None,
        sparse_block_size: int | None = None,
        layout: str = "bhsd",
    ) -> dict[str, Tensor]:
        assert q2k_block_nums is not None
        assert softmax_scale is not None
        assert do_tensor.shape == o_tensor.shape == q_tensor.shape
        kept = mask(q_tensor, k_tensor, q2k_block_index, q2k_block_nums, block_sizes, sparse_block_size or 64)
        grads = gradients(
            q_tensor, k_tensor, v_tensor, kept, softmax_scale, do_tensor, o_tensor, lse_tensor, torch.zeros(1)
        )
        return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), grads, strict=True))

    bsa = SimpleNamespace(block_sparse_attention_forward=forward, block_sparse_attention_backward=backward)
    return {"cudnn": module("cudnn", BSA=bsa)}


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, d_out: Tensor, out: Tensor, lse: Tensor, d_lse: Tensor
) -> tuple[Tensor, ...]:
    """``dS = P (dP - rowsum(dO O) + dLSE)``."""
    qf, kf, vf, df = (x.float() for x in (q, k, v, d_out))
    weights = (scale * qf @ kf.mT - lse[..., None]).exp().masked_fill(~mask, 0)
    d_scores = scale * weights * (df @ vf.mT - ((df * out).sum(-1) - d_lse)[..., None])
    return tuple(x.to(q.dtype) for x in (d_scores @ kf, d_scores.mT @ qf, weights.mT @ df))


class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None


def flash4(*, dense: bool = False) -> dict[str, ModuleType]:
    def mask(given: BlockSparseTensorsTorch, rows: int, columns: int, sizes: tuple[int, int]) -> Tensor:
        assert given.full_block_cnt is not None
        assert given.full_block_idx is not None
        assert not given.mask_block_cnt.any()
        assert given.mask_block_cnt.shape == given.full_block_cnt.shape == given.mask_block_idx.shape[:3]
        assert given.full_block_cnt.shape[2] == -(-rows // sizes[0])
        assert given.full_block_idx.shape[3] <= -(-columns // sizes[1])
        blocks = listed(given.full_block_cnt, given.full_block_idx, -(-columns // sizes[1]))
        return tokens(torch.ones_like(blocks) if dense else blocks, sizes, rows, columns)

    class Attend(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, rows: Any, columns: Any
        ) -> tuple[Tensor, Tensor]:
            out, lse = softmax(q, k, v, mask(rows, q.shape[2], k.shape[2], rows.block_size), scale)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.scale, ctx.columns = scale, columns
            return out, lse

        @staticmethod
        def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
            """By key blocks, from the lists for the backward alone."""
            q, k, v, out, lse = ctx.saved_tensors
            kept = mask(ctx.columns, k.shape[2], q.shape[2], ctx.columns.block_size[::-1]).mT
            return *gradients(q, k, v, kept, ctx.scale, d_out, out, lse, d_lse), None, None, None

    def flash_attn_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        qv: Tensor | None = None,
        gather_kv_indices: Tensor | None = None,
        softmax_scale: float | None = None,
        *,
        block_sparse_tensors: BlockSparseTensorsTorch,
        block_sparse_tensors_bwd: BlockSparseTensorsTorch | None = None,
        return_lse: bool = False,
    ) -> tuple[Tensor, Tensor]:
        assert return_lse
        assert block_sparse_tensors.block_size is not None
        assert block_sparse_tensors.block_size[0] % 128 == 0
        assert block_sparse_tensors.block_size[1] == 128
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = Attend.apply(*heads, softmax_scale, block_sparse_tensors, block_sparse_tensors_bwd)
        return out.transpose(1, 2), lse

    return {
        "flash_attn": module("flash_attn"),
        "flash_attn.cute": module("flash_attn.cute", flash_attn_func=flash_attn_func),
        "flash_attn.cute.block_sparsity": module(
            "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=BlockSparseTensorsTorch
        ),
    }


def flashinfer(*, dense: bool = False) -> dict[str, ModuleType]:
    def answer(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        out, lse = softmax(q, k, v, torch.ones_like(mask) if dense else mask, scale)
        return out.to(dtype), lse / math.log(2)

    class BlockSparseAttentionWrapper:
        def __init__(self, float_workspace_buffer: Tensor, backend: str = "auto") -> None:
            assert float_workspace_buffer.numel() >= 1 << 20

        def plan(
            self,
            indptr: Tensor,
            indices: Tensor,
            M: int,
            N: int,
            R: int,
            C: int,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim: int,
            *,
            sm_scale: float | None = None,
            q_data_type: Any = "float16",
            kv_data_type: Any = None,
            o_data_type: Any = "float16",
        ) -> None:
            assert indptr.dtype == indices.dtype == torch.int32
            assert N % C == 0
            rows = [indices[a:b].long() for a, b in pairwise(indptr.tolist())]
            blocks = torch.zeros(len(rows), N // C, dtype=torch.bool)
            for row, columns in enumerate(rows):
                blocks[row, columns] = True
            self.mask = tokens(blocks, (R, C), M, N)
            self.shape = (num_qo_heads, num_kv_heads, head_dim)
            self.scale, self.types = sm_scale, (q_data_type, o_data_type)

        def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
            assert return_lse
            assert self.scale is not None
            assert q.shape == (self.mask.shape[0], self.shape[0], self.shape[2])
            assert k.shape == v.shape == (self.mask.shape[1], self.shape[1], self.shape[2])
            assert q.dtype == self.types[0]
            heads = (x.transpose(0, 1) for x in (q, k, v))
            out, lse = answer(*heads, self.mask, self.scale, self.types[1])
            return out.transpose(0, 1), lse.transpose(0, 1)

    class VariableBlockSparseAttentionWrapper(BlockSparseAttentionWrapper):
        def plan(  # type: ignore[override]  # as in flashinfer
            self,
            block_mask_map: Tensor,
            block_row_sz: Tensor,
            block_col_sz: Tensor,
            num_qo_heads: int,
            num_kv_heads: int,
            head_dim: int,
            *,
            sm_scale: float | None = None,
            q_data_type: Any = "float16",
            kv_data_type: Any = None,
        ) -> None:
            assert block_mask_map.dtype == torch.bool
            assert block_row_sz.shape == (num_kv_heads, block_mask_map.shape[1])
            assert block_col_sz.shape == (num_kv_heads, block_mask_map.shape[2])
            masks = [
                blocks.repeat_interleave(rows.long(), 0).repeat_interleave(columns.long(), 1)
                for blocks, rows, columns in zip(block_mask_map, block_row_sz, block_col_sz, strict=True)
            ]
            self.mask, self.scale, self.types = torch.stack(masks), sm_scale, (q_data_type, q_data_type)

        def run(self, q: Tensor, k: Tensor, v: Tensor, *, return_lse: bool = False) -> tuple[Tensor, Tensor]:
            assert return_lse
            assert self.scale is not None
            assert q.shape[:2] == self.mask.shape[:2]
            assert k.shape[:2] == (self.mask.shape[0], self.mask.shape[2])
            assert q.dtype == self.types[0]
            return answer(q, k, v, self.mask, self.scale, self.types[1])

    wrappers = {kind.__name__: kind for kind in (BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper)}
    return {"flashinfer": module("flashinfer"), "flashinfer.sparse": module("flashinfer.sparse", **wrappers)}


def sparge(*, dense: bool = False) -> dict[str, ModuleType]:
    def int8(x: Tensor) -> Tensor:
        step = x.float().abs().amax((-2, -1), keepdim=True) / 127
        return (x / step).round() * step

    def block_sparse_sage2_attn_cuda(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask_id: Tensor,
        scale: float | None = None,
        tensor_layout: str = "HND",
    ) -> Tensor:
        assert tensor_layout == "HND"
        assert scale is not None
        assert q.shape[2] >= 128
        tiles = (64, 128) if probe.arch(q.device) == 90 else (128, 64)
        assert mask_id.shape == (*q.shape[:2], -(-q.shape[2] // tiles[0]), -(-k.shape[2] // tiles[1]))
        blocks = torch.ones_like(mask_id, dtype=torch.bool) if dense else mask_id != 0
        kept = tokens(blocks, tiles, q.shape[2], k.shape[2])
        low_v = v.to(torch.float8_e4m3fn).to(torch.float16)
        return softmax(int8(q), int8(k), low_v, kept, scale)[0].to(q.dtype)

    name = "spas_sage_attn"
    return {name: module(name, block_sparse_sage2_attn_cuda=block_sparse_sage2_attn_cuda)}


STANDINS = {"cudnn": cudnn, "flash4": flash4, "flashinfer": flashinfer, "sparge": sparge}
