"""The embedded default: a true `WanPipeline` in miniature, trained on coloured, moving handwritten digits."""

from pathlib import Path


def path() -> Path:
    """The checkpoint's folder, for `WanPipeline.from_pretrained`."""
    return Path(__file__).parent / "checkpoint"
