"""Videos of the miniature's world with their captions, as files that any training takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.progress import track

from falloff.evaluation import files, video
from falloff.miniature import digits
from falloff.miniature.checkpoint import GENERATION

PAIRS = 0.5
"""Share of clips with two digits."""


def write_clips(folder: Path, count: int, frames: int, seed: int) -> None:
    """``count`` mp4 files of ``frames`` frames, each with a .txt beside it.

    Captions and handwritings are of the training part, so that what is held out stays new to the tuned model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number in track(range(count), description="clips"):
        rng = np.random.default_rng([seed, number])
        caption = digits.draw_caption(rng, 1 + int(rng.random() < PAIRS), heldout=False)
        clip = digits.render(digits.draw_scene(rng, caption), frames)
        video.write(folder / f"{number:05d}.mp4", clip, GENERATION["fps"])
        files.write(folder / f"{number:05d}.txt", caption + "\n")
