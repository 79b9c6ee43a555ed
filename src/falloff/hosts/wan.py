"""Wan 2.1 and 2.2: text to video, image to video, video to video, one or two experts.

Self-attention sees the video's tokens alone, in raster order (frames, height, width); text and image conditions
enter through cross-attention.
"""

from __future__ import annotations

from falloff.hosts import Argument, Host

HOST = Host(
    family="Wan",
    models=("WanTransformer3DModel",),
    self_attention=("blocks.*.attn1",),
    latent=Argument(name="hidden_states", position=0),
    patch=lambda config: tuple(config.patch_size),
    timestep=Argument(name="timestep", position=1),
    branches=("cond", "uncond"),
    refused={
        "WanVACETransformer3DModel": "its control blocks run their own self-attention, which has no host yet",
        "WanAnimateTransformer3DModel": "its reference and pose frames have no grid of their own yet",
    },
)
