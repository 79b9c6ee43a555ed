"""Wan 2.1 and 2.2: text, image and video to video, one or two experts, VACE and Animate.

Self-attention sees the video's tokens alone, in raster order (frames, height, width); text and image conditions
enter through cross-attention. Reference images of VACE and Animate are further frames, before the video's own.
"""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

HOST = Host(
    family="Wan",
    models=("WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel"),
    self_attention=("blocks.*.attn1", "vace_blocks.*.attn1"),
    grid=latent_grid(lambda config: tuple(config.patch_size)),
)
