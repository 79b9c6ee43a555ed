"""Processors in place of those that call PyTorch's attention themselves, where no dispatcher could reach them.

Each does what its original does, and hands queries, keys and values to diffusers' dispatcher.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.attention_processor import (
    AllegroAttnProcessor2_0,
    CogVideoXAttnProcessor2_0,
    FusedCogVideoXAttnProcessor2_0,
    MochiAttnProcessor2_0,
)
from diffusers.models.embeddings import apply_rotary_emb, apply_rotary_emb_allegro
from torch import Tensor


class CogVideoX(CogVideoXAttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """[text, video]; rotary embedding on the video."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise NotImplementedError("falloff knows no pipeline that masks CogVideoX's attention; disable it first")
        text = encoder_hidden_states.shape[1]
        both = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        projected = attn.to_qkv(both).chunk(3, dim=-1) if attn.fused_projections else _projected(attn, both)
        query, key, value = (_heads(attn, x) for x in projected)
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if image_rotary_emb is not None:
            query, key = (_turned_after(x, text, image_rotary_emb) for x in (query, key))
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        out = _out(attn, out)
        return out[:, text:], out[:, :text]


class Mochi(MochiAttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """[video, text], each sample without its own padding: a mask says which text is valid."""

    _attention_backend: Any = None
    _parallel_config: Any = None
    drops_padding = True
    """The original runs every sample by itself, without its invalid tokens."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        video = hidden_states.shape[1]
        query, key, value = (_heads(attn, x) for x in _projected(attn, hidden_states))
        query, key = _normed(attn.norm_q, query), _normed(attn.norm_k, key)
        if image_rotary_emb is not None:
            query, key = (_turned_pairs(x, *image_rotary_emb) for x in (query, key))
        text_projected = (
            project(encoder_hidden_states) for project in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        )
        text_query, text_key, text_value = (x.unflatten(2, (attn.heads, -1)) for x in text_projected)
        text_query, text_key = _normed(attn.norm_added_q, text_query), _normed(attn.norm_added_k, text_key)
        out = dispatch_attention_fn(
            torch.cat([query, text_query], dim=1),
            torch.cat([key, text_key], dim=1),
            torch.cat([value, text_value], dim=1),
            attn_mask=torch.nn.functional.pad(attention_mask.bool(), (video, 0), value=True)[:, None, None],
            backend=self._attention_backend,
        )
        out = out.flatten(2)
        text_out = out[:, video:]
        return _out(attn, out[:, :video, None]), attn.to_add_out(text_out) if hasattr(attn, "to_add_out") else text_out


class Allegro(AllegroAttnProcessor2_0):  # type: ignore[misc]  # diffusers has no types
    """Video alone."""

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple[Any, Any] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            raise NotImplementedError("falloff knows no pipeline that masks Allegro's video; disable it first")
        query, key, value = (_heads(attn, x) for x in _projected(attn, hidden_states))
        if image_rotary_emb is not None:
            query, key = (
                apply_rotary_emb_allegro(x.transpose(1, 2), *image_rotary_emb).transpose(1, 2) for x in (query, key)
            )
        out = dispatch_attention_fn(query, key, value, backend=self._attention_backend)
        scaled: Tensor = _out(attn, out) / attn.rescale_output_factor
        return scaled


SUBSTITUTES: dict[type, type] = {
    AllegroAttnProcessor2_0: Allegro,
    CogVideoXAttnProcessor2_0: CogVideoX,
    FusedCogVideoXAttnProcessor2_0: CogVideoX,
    MochiAttnProcessor2_0: Mochi,
}
OURS = tuple(SUBSTITUTES.values())


def per_sample(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float | None, backend: Any
) -> Tensor:
    """Dense attention of every sample without its invalid tokens, which give 0: [B, S, H, D]; mask [B, 1, 1, S]."""
    assert mask is not None  # Mochi always has one
    out = torch.zeros_like(value)
    for sample, valid in enumerate(mask[:, 0, 0]):
        one = (x[sample : sample + 1, valid] for x in (query, key, value))
        out[sample, valid] = dispatch_attention_fn(*one, scale=scale, backend=backend)[0]
    return out


def _projected(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return attn.to_q(x), attn.to_k(x), attn.to_v(x)


def _heads(attn: Any, x_BSC: Tensor) -> Tensor:
    heads: Tensor = x_BSC.unflatten(2, (attn.heads, -1))  # type: ignore[no-untyped-call]  # PyTorch left it untyped
    return heads


def _normed(norm: Any | None, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


def _turned_after(x_BSHD: Tensor, start: int, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding on the tokens from ``start`` on."""
    turned = apply_rotary_emb(x_BSHD[:, start:], rotary, sequence_dim=1)
    return torch.cat([x_BSHD[:, :start], turned], dim=1)


def _turned_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Mochi's rotary embedding: neighbouring channels are the two parts of a number, turned by one angle a head."""
    real, imaginary = x[..., 0::2].float(), x[..., 1::2].float()
    turned = (real * cos - imaginary * sin).to(x.dtype), (real * sin + imaginary * cos).to(x.dtype)
    return torch.stack(turned, dim=-1).flatten(-2)


def _out(attn: Any, x_BSHD: Tensor) -> Tensor:
    """Heads joined and projected; the second of the two is dropout."""
    out: Tensor = attn.to_out[1](attn.to_out[0](x_BSHD.flatten(2)))
    return out
