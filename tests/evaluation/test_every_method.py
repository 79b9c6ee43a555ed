"""All methods in one comparison, on a tiny pipeline of each kind: video, video with text beside it, image."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small import small
from tiny import ALWAYS
from worded import pipeline

from falloff.evaluation import report
from falloff.evaluation.compare import compare
from falloff.methods import METHODS

sys.path.append(str(Path(__file__).parents[1] / "training"))

VIDEO = {"num_frames": 21, "height": 64, "width": 96, "num_inference_steps": 2}


def wan() -> tuple[Any, dict[str, Any]]:
    return pipeline(), {**VIDEO, "max_sequence_length": 8}


def hunyuan_video() -> tuple[Any, dict[str, Any]]:
    import tiny_hunyuan_video

    picture = Image.fromarray(np.full((64, 96, 3), 99, np.uint8))
    return tiny_hunyuan_video.hunyuan_video(beside=True), {**VIDEO, "image": picture}


def flux() -> tuple[Any, dict[str, Any]]:
    import further_pipes

    size = {"height": 256, "width": 256, "num_inference_steps": 2, "max_sequence_length": 8}
    return further_pipes.flux(), size


@pytest.mark.parametrize("kind", [wan, hunyuan_video, flux])
def test_one_comparison_holds_every_method(kind: Any, tmp_path: Path) -> None:
    pipe, call = kind()
    pipe.set_progress_bar_config(disable=True)
    image = "num_frames" not in call
    names = [name for name, method in METHODS.items() if name != "dense" and not (image and method.needs_frames)]
    methods = [small(name) for name in names]
    comparison = compare(pipe, "a fox", methods, schedule=ALWAYS, **call)
    assert [arm.method for arm in comparison.methods] == names
    whole = {arm.label: arm.reasons for arm in comparison.methods if arm.density is None or not 0 < arm.density < 1}
    assert not whole
    assert all(0 < arm.recall <= 1 for arm in comparison.methods)
    written = report.write(comparison, tmp_path)
    page = written[0].read_text()
    assert all(arm.label in page for arm in comparison.methods)
    assert sum(path.suffix == (".png" if image else ".mp4") for path in written) == len(names) + 1
