"""A tiny pipeline that takes prompts in words, and a folder of tiny videos."""

import sys
from pathlib import Path

import pytest
from tiny_clips import write_clip

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos of 9 frames of 32 x 32, captions beside them."""
    folder = tmp_path_factory.mktemp("clips")
    for number in range(5):
        write_clip(folder / f"{number}.mp4", shade=40 * number)
        (folder / f"{number}.txt").write_text("a fox\n" if number % 2 else "a")
    return folder


@pytest.fixture
def pipe():
    from worded import pipeline

    made = pipeline()
    made.set_progress_bar_config(disable=True)
    return made
