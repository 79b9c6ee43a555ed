"""Mochi: attention over the video's tokens in raster order, then those of each sample's text that are valid."""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

HOST = Host(
    family="Mochi",
    models=("MochiTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    grid=latent_grid(lambda config: (1, config.patch_size, config.patch_size)),
    text_side="after",
    branches=("cond_uncond",),
)
