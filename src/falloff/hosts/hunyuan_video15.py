"""HunyuanVideo 1.5, text and image to video: attention over the video in raster order, then image and text tokens.

Those are sorted anew in every sample, valid ones first, and every layer makes a mask of valid queries by valid keys.
"""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

HOST = Host(
    family="HunyuanVideo 1.5",
    models=("HunyuanVideo15Transformer3DModel",),
    self_attention=("transformer_blocks.*.attn",),
    grid=latent_grid(lambda config: (config.patch_size_t, config.patch_size, config.patch_size)),
    text_side="after",
    square_mask=True,
)
