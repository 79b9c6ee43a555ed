"""What a self-attention call makes Python do on its way through the seam, counted in functions and not in time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import tiny
import torch
from torch import nn

import falloff

OURS = str(Path(falloff.__file__).parent)
KEPT_DENSE = falloff.Schedule(dense_first=1.0)
FUNCTIONS_A_CALL = 16
"""Two hooks, the route to the session, the decision looked up, the model's own attention and its name, and the mark."""


def functions(model: nn.Module) -> Counter[str]:
    """How often one forward entered each function of ours, or that one of ours called, by its name."""
    found: Counter[str] = Counter()

    def enter(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and any(
            here is not None and here.f_code.co_filename.startswith(OURS) for here in (frame, frame.f_back)
        ):
            found[frame.f_code.co_qualname if sys.version_info >= (3, 11) else frame.f_code.co_name] += 1

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        with torch.no_grad():
            model(**tiny.inputs())
    finally:
        sys.setprofile(before)
    return found


def more_a_layer(method: falloff.Method, schedule: falloff.Schedule) -> dict[str, float]:
    """What each further layer adds to a forward, once the first has made the plan."""
    counts = []
    for layers in (3, 7):
        model = falloff.enable(tiny.transformer(layers=layers), method, schedule=schedule)
        functions(model)
        counts.append(functions(model))
        assert len(falloff.report(model).calls) == 2 * layers
    few, many = counts
    return {name: (many[name] - few[name]) / 4 for name in many if many[name] != few[name]}


@pytest.mark.parametrize(
    ("method", "schedule"),
    [(tiny.FULL, tiny.ALWAYS), (tiny.Frames(), KEPT_DENSE)],
    ids=["every block on", "kept dense"],
)
def test_a_further_layer_decides_nothing_anew(method: falloff.Method, schedule: falloff.Schedule) -> None:
    added = more_a_layer(method, schedule)
    assert sum(added.values()) <= FUNCTIONS_A_CALL, added
    assert not any("__" in name for name in added), added  # no object of ours is made
