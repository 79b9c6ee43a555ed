"""An autoregressive image model in miniature: handwritten digits by class, decoded in parallel."""

from pathlib import Path


def path() -> Path:
    """The checkpoint's folder, for `LPDPipeline.from_pretrained`."""
    return Path(__file__).parent / "checkpoint"


def judge() -> Path:
    """The classifier that reads its pictures, for `falloff.miniature.images.measure.Judge`."""
    return Path(__file__).parent / "judge.safetensors"
