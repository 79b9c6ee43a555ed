"""Kandinsky 5: attention over the visual tokens alone, in raster order; text enters through cross-attention."""

from __future__ import annotations

from typing import Any

from falloff.hosts import Host, latent_grid


def _refuse(config: Any) -> str | None:
    """With ``attention_type="nabla"``, its own sparse attention on tokens in another order."""
    if config.attention_type == "nabla":
        return "its attention is sparse already (NABLA, attention_type='nabla'), on tokens in another order"
    return None


HOST = Host(
    family="Kandinsky 5",
    models=("Kandinsky5Transformer3DModel",),
    self_attention=("visual_transformer_blocks.*.self_attention",),
    grid=latent_grid(lambda config: tuple(config.patch_size), axes=(1, 2, 3)),
    refuse=_refuse,
)
