"""Context parallelism of diffusers: processes share the tokens, and for the time of attention the heads (Ulysses).

Before attention every process gives [B, S / P, H, D] of its own tokens for [B, S, H / P, D] of its own heads, and
after it the other way round, so that a plan for all tokens serves every process.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from diffusers.models import attention_dispatch
from torch import Tensor


def config_of(model: Any, processor: Any) -> Any | None:
    """The context parallelism that a processor runs under (diffusers' ``ContextParallelConfig``), if any."""
    holder = processor if hasattr(processor, "_parallel_config") else model
    config = getattr(holder, "_parallel_config", None)
    return None if config is None else config.context_parallel_config


def fault(config: Any, *, dispatched: bool, square_mask: bool) -> str | None:
    """Why attention under this parallelism cannot be served, ``None`` where it can.

    ``dispatched``: the model's own processors go through diffusers' dispatcher. ``square_mask``: see ``Host``.
    """
    if not hasattr(attention_dispatch, "SeqAllToAllDim"):
        return "this version of diffusers has no exchange of tokens for heads to share; a newer one has"
    if config.ring_degree > 1:
        return (
            f"ring attention (ring_degree={config.ring_degree}) shows a process a part of the keys at a time, and "
            f"plans are for all; use ContextParallelConfig(ulysses_degree={config.ring_degree * config.ulysses_degree})"
        )
    if getattr(config, "ulysses_anything", False):  # older versions of diffusers cannot
        return "uneven shares (ulysses_anything=True) are in no order a plan knows; use sizes that divide evenly"
    if not dispatched:
        return "diffusers itself does not exchange the tokens of this family, whose attention each process does alone"
    if square_mask:
        return "each process masks pairs of its own tokens alone, from which no mask of all can be made"
    return None


def shares(config: Any | None) -> tuple[int, int]:
    """How many processes share the tokens, and the number of this one."""
    return (1, 0) if config is None else (config.ulysses_degree, config._ulysses_local_rank)


def all_tokens(x_BSHD: Tensor, config: Any) -> Tensor:
    """[B, S / P, H, D] to [B, S, H / P, D]: heads number rank * H / P and on, tokens share by share.

    Raises ``ValueError`` when the heads cannot be shared evenly.
    """
    heads, count = x_BSHD.shape[2], config.ulysses_degree
    if heads % count:
        raise ValueError(f"{heads} heads have no even shares for {count} processes; use a ulysses_degree dividing them")
    out: Tensor = attention_dispatch.SeqAllToAllDim.apply(config._ulysses_mesh.get_group(), x_BSHD, 2, 1)
    return out


def own_tokens(x_BSHD: Tensor, config: Any) -> Tensor:
    """[B, S, H / P, D] back to [B, S / P, H, D]."""
    out: Tensor = attention_dispatch.SeqAllToAllDim.apply(config._ulysses_mesh.get_group(), x_BSHD, 1, 2)
    return out


def whole_mask(mask: Tensor | None, config: Any) -> Tensor | None:
    """A mask over the keys of every process, [B | 1, 1, 1, S], from one over this process's own."""
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
        raise NotImplementedError(
            f"falloff serves masks over keys alone under context parallelism, [B, 1, 1, S], got {tuple(mask.shape)}"
        )
    masks = [torch.empty_like(mask) for _ in range(config.ulysses_degree)]
    dist.all_gather(masks, mask.contiguous(), group=config._ulysses_mesh.get_group())
    return torch.cat(masks, dim=-1)
