"""Videos of the miniature's world as files."""

from pathlib import Path

import numpy as np

from falloff.evaluation import video
from falloff.miniature import digits
from falloff.miniature.clips import write_clips


def test_clips_are_of_the_training_part_and_the_same_every_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_clips(tmp_path / name, count=3, frames=9, seed=4)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert files == [f"{number:05d}.{kind}" for number in range(3) for kind in ("mp4", "txt")]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    for number in range(3):
        caption = (tmp_path / "one" / f"{number:05d}.txt").read_text().strip()
        assert not digits.held_out(caption)
        frames = video.read(tmp_path / "one" / f"{number:05d}.mp4")
        assert frames.shape == (9, 128, 128, 3)
        colour = np.array(digits.COLOURS[digits.parse(caption)[0].colour])
        bright = frames.reshape(-1, 3)[frames.reshape(-1, 3).sum(axis=1) > 150]
        assert (bright @ (colour - colour.mean()) > 0).any()  # something of the asked colour is there
