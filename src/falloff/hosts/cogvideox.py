"""CogVideoX and CogVideoX 1.5, text and image to video: attention over text, then the video in raster order."""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

HOST = Host(
    family="CogVideoX",
    models=("CogVideoXTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn1",),
    grid=latent_grid(lambda config: (config.patch_size_t or 1, config.patch_size, config.patch_size), axes=(1, 3, 4)),
    text_side="before",
    branches=("cond_uncond",),
    refused={
        "ConsisIDTransformer3DModel": "its face tokens have no host yet",
    },
)
