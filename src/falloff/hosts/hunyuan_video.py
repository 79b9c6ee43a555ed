"""HunyuanVideo: text to video, image to video.

Two-stream and one-stream layers attend over the video's tokens in raster order, then the text's, padded to one
length for all samples; masks are over keys, [B, 1, 1, S]. The text's refiner has attention of the same class under
another path.
"""

from __future__ import annotations

from falloff.hosts import Host, latent_grid

HOST = Host(
    family="HunyuanVideo",
    models=("HunyuanVideoTransformer3DModel",),
    self_attention=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
    grid=latent_grid(lambda config: (config.patch_size_t, config.patch_size, config.patch_size)),
    text_side="after",
    refused={
        "HunyuanVideoFramepackTransformer3DModel": "it packs frames of the past at several sizes, which are no grid"
    },
)
