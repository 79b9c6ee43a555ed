"""LTX-Video and LTX-2: attention over the video's tokens alone, in raster order; text enters through cross-attention.

The latent comes as a sequence already, so its size is told beside it. The audio of LTX-2 has layers of its own, which
are left alone.
"""

from __future__ import annotations

from typing import Any

from falloff.hosts import Given, Host, Size


def _grid(given: Given, config: Any) -> Size | str:
    frames, height, width = (given.get(name) for name in ("num_frames", "height", "width"))
    if frames is None or height is None or width is None:
        return "the pipeline gives coordinates in place of a size, as with conditions anywhere in the video"
    return frames, height, width


HOST = Host(
    family="LTX",
    models=("LTXVideoTransformer3DModel", "LTX2VideoTransformer3DModel"),
    self_attention=("transformer_blocks.*.attn1",),
    grid=_grid,
    branches=("cond_uncond",),
)
