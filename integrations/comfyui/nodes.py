"""ComfyUI's nodes of falloff: settings on the screen in, a patched MODEL out. The work is in falloff itself."""

from __future__ import annotations

from typing import Any

import falloff
from falloff import kernels
from falloff.hosts import comfyui

CATEGORY = "model_patches/falloff"
BLOCKS = ("auto", "32", "64", "128")


class FalloffRadialAttention:
    """Radial Attention over the video in a MODEL's self-attention."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Attention whose reach shrinks with distance in time (Radial Attention), for Wan and HunyuanVideo."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        share = {"min": 0.0, "max": 1.0, "step": 0.01}
        return {
            "required": {
                "model": ("MODEL",),
                "decay": (
                    "FLOAT",
                    {"default": 0.2, **share, "tooltip": "Widths of the windows: less is faster and further off."},
                ),
                "dense_first": (
                    "FLOAT",
                    {"default": 0.25, **share, "tooltip": "Share of this sampler's steps, from its first, kept dense."},
                ),
                "dense_layers": (
                    "INT",
                    {"default": 1, "min": 0, "max": 100, "tooltip": "Layers, from the first, kept dense."},
                ),
                "block": (BLOCKS, {"default": "auto", "tooltip": "Tokens a block; auto goes by the size of a frame."}),
                "kernel": (("auto", *(name for name, _, _ in kernels.available())), {"default": "auto"}),
            }
        }

    def patch(
        self, model: Any, decay: float, dense_first: float, dense_layers: int, block: str, kernel: str
    ) -> tuple[Any]:
        method = falloff.Radial(decay=decay, block="auto" if block == "auto" else int(block))
        schedule = falloff.Schedule(dense_first=dense_first, dense_layers=tuple(range(dense_layers)))
        return (comfyui.patch(model, method, schedule=schedule, kernel=kernel),)


class FalloffReport:
    """What the last run did: density, kernel, and a reason for every dense call."""

    CATEGORY = CATEGORY
    DESCRIPTION = "Connect the falloff MODEL, and the sampler's LATENT so that this runs after it."
    RETURN_TYPES = ("LATENT", "STRING")
    RETURN_NAMES = ("latent", "report")
    FUNCTION = "report"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",), "latent": ("LATENT",)}}

    @classmethod
    def IS_CHANGED(cls, **unused: Any) -> float:
        return float("nan")  # a run differs from the one before, even where nothing in the workflow does

    def report(self, model: Any, latent: Any) -> dict[str, Any]:
        text = comfyui.describe(model)
        return {"ui": {"text": [text]}, "result": (latent, text)}


NODE_CLASS_MAPPINGS = {"FalloffRadialAttention": FalloffRadialAttention, "FalloffReport": FalloffReport}
NODE_DISPLAY_NAME_MAPPINGS = {
    "FalloffRadialAttention": "Radial Attention (falloff)",
    "FalloffReport": "Attention Report (falloff)",
}
