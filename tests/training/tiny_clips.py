"""Tiny videos made up for training."""

from pathlib import Path

import numpy as np


def write_clip(file: Path, frames: int = 9, side: int = 32, shade: int = 0) -> None:
    from falloff.evaluation import video

    t, y, x = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    picture = np.stack([x * 8 + shade, y * 8, t * 20], axis=-1) % 256
    video.write(file, picture.astype(np.uint8), 8)
