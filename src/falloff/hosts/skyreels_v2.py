"""SkyReels-V2, text and image to video and diffusion forcing: attention over the video alone, in raster order."""

from __future__ import annotations

from typing import Any

from falloff.hosts import Host, latent_grid


def _refuse(config: Any) -> str | None:
    """Runs with ``causal_block_size`` above 1, where frames attend in causal blocks."""
    if config.num_frame_per_block > 1:
        return "its frames attend in causal blocks (causal_block_size > 1); falloff.disable it for such a run"
    return None


HOST = Host(
    family="SkyReels-V2",
    models=("SkyReelsV2Transformer3DModel",),
    self_attention=("blocks.*.attn1",),
    grid=latent_grid(lambda config: tuple(config.patch_size)),
    refuse=_refuse,
)
