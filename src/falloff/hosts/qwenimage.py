"""QwenImage, image and edit: attention over text, then the image's tokens in raster order, then other images' tokens.

Images to edit, and layers, of the image's own size are further frames of the grid. Text is padded; masks are over
keys, [B, 1, 1, S].
"""

from __future__ import annotations

from typing import Any

from falloff.hosts import Given, Host, Size


def _grid(given: Given, config: Any) -> Size | str:
    samples = [sample if isinstance(sample, list) else [sample] for sample in given["img_shapes"]]
    if any(sample != samples[0] for sample in samples):
        return "the samples' images differ in size"
    (_, height, width), *others = (tuple(shape) for shape in samples[0])
    if any(shape[1:] != (height, width) for shape in others):
        return f"the other images are not of the image's size, {height}x{width} tokens"
    return sum(shape[0] for shape in samples[0]), height, width


HOST = Host(
    family="QwenImage",
    models=("QwenImageTransformer2DModel",),
    self_attention=("transformer_blocks.*.attn",),
    grid=_grid,
    text_side="before",
    frames=False,
)
