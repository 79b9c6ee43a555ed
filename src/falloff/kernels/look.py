"""What leaving keys to the mean of their block costs some queries, on CPUs in C++ of our own (simd/)."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from falloff.kernels import compiled
from falloff.kernels.simd_call import Call, Strided, channels_together, side, starts

SOURCE = Path(__file__).parent / "simd" / "look.cpp"


def runs(keys_BHND: Tensor) -> bool:
    """Whether queries can be looked at here."""
    return compiled.runs(SOURCE, keys_BHND)


def spared(
    looked_BHRD: Tensor, keys_BHND: Tensor, order_BHN: Tensor, sizes_BHC: Tensor, per_cluster: int, scale: float
) -> Tensor:
    """Mean squares that weights of a softmax are off by, were they those of their block's mean: [B, H, Cq, Ck].

    ``looked_BHRD``: ``per_cluster`` queries of each of Cq blocks, over which is averaged. ``order_BHN``: the keys block
    by block, as many as ``sizes_BHC``. Both kinds of weights are shares of the exact softmax's sum. 0 for blocks
    without keys.
    """
    q, k, order = channels_together(looked_BHRD), channels_together(keys_BHND), order_BHN.contiguous()
    batch, heads, rows, channels = q.shape
    blocks, first = sizes_BHC.shape[2], starts(sizes_BHC)
    out = q.new_empty(batch, heads, rows // per_cluster, blocks)
    call = Call(batch=batch, heads=heads, channels=channels, scale=scale)
    call.rows.blocks, call.rows.tokens = rows // per_cluster, rows
    call.columns = side(order, first, blocks, k.shape[2])
    for name, x in (("q", q), ("k", k), ("out", out)):
        setattr(call, name, Strided(x.data_ptr(), *x.stride()[:3]))
    call.threads = compiled.threads(q.numel() * k.shape[2])
    compiled.call(SOURCE, "falloff_look", call)
    return out
