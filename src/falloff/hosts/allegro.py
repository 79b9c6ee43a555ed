"""Allegro: attention over the video's tokens alone, in raster order; text enters through cross-attention."""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

HOST = Host(
    family="Allegro",
    models=("AllegroTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    grid=latent_grid(lambda config: (config.patch_size_t, config.patch_size, config.patch_size)),
    branches=("cond_uncond",),
)
