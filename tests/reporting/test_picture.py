"""The picture of a run: every call has its place, branches that differ their own, and words of users are escaped."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from falloff import Radial, Schedule
from falloff.reporting import Record, Report
from falloff.reporting.picture import HATCHES, OTHER, REASONS_TOLD, panels, picture


def record(**values: Any) -> Record:
    usual = {"run": 0, "step": 0, "model": 0, "layer": 0, "branch": "cond", "density": 0.25, "kernel": "cpu"}
    return Record(**{**usual, "reason": None, "plan_seconds": 0.0, "attention_seconds": None, **values})


def dense(reason: str, **values: Any) -> Record:
    return record(density=1.0, kernel="native", reason=reason, **values)


def rectangles(svg: str) -> list[tuple[ET.Element, str]]:
    found = [(element, element.findtext("{*}title")) for element in ET.fromstring(svg).iter() if "x" in element.attrib]
    return [(element, title) for element, title in found if title is not None]


def test_neighbouring_steps_that_did_the_same_are_one_rectangle() -> None:
    calls = [
        dense("dense first step", step=0),
        *(record(step=step, attention_seconds=step / 1000) for step in (1, 2, 3)),
    ]
    (first, words), (second, others) = rectangles(picture(calls))
    assert words == "layer 0, step 0: dense: dense first step, native"
    assert others == "layer 0, steps 1 to 3: 25.0% of the pairs, cpu, 2 ms a call"
    assert float(second.attrib["width"]) == 3 * float(first.attrib["width"])
    assert float(second.attrib["x"]) == float(first.attrib["x"]) + float(first.attrib["width"])
    assert first.attrib["fill"].startswith("url(#")
    assert 0.1 < float(second.attrib["fill-opacity"]) < 1


def test_steps_that_were_skipped_stay_empty() -> None:
    """As with a step cache."""
    calls = [record(step=step, layer=layer) for step in (0, 1, 2) for layer in (0, 1) if layer == 0 or step != 1]
    words = [title.partition(":")[0] for _, title in rectangles(picture(calls))]
    assert words == ["layer 0, steps 0 to 2", "layer 1, step 0", "layer 1, step 2"]


def test_branches_and_models_are_apart_where_they_differ() -> None:
    same = [record(branch=branch, step=step) for step in (0, 1) for branch in ("cond", "uncond")]
    assert [panel.name for panel in panels(same)] == ["cond and uncond"]
    differing = [*same[:-1], record(branch="uncond", step=1, density=0.5)]
    assert [panel.name for panel in panels(differing)] == ["cond", "uncond"]
    two = [*same, *(record(model=1, step=step) for step in (2, 3))]
    drawn = panels(two)
    assert [panel.name for panel in drawn] == ["transformer 1, cond and uncond", "transformer 2, cond"]
    assert [list(panel.steps) for panel in drawn] == [[0, 1], [2, 3]]
    assert len(rectangles(picture(two))) == 2


def test_unknown_step_and_branch_have_a_place() -> None:
    svg = picture([record(step=None, branch=None)])
    assert ">?</text>" in svg
    assert rectangles(svg)[0][1] == "layer 0, step None: 25.0% of the pairs, cpu"


def test_reasons_have_their_hatching_and_the_rare_ones_share_one() -> None:
    few = [dense(f"reason {number}", layer=number) for number in range(3)]
    svg = picture(few)
    assert svg.count("<pattern") == 3
    assert all(f">reason {number}</text>" in svg for number in range(3))
    assert OTHER not in svg
    many = [dense(f"reason {number}", layer=number) for number in range(REASONS_TOLD + 5)]
    svg = picture([*many, dense("reason 9", layer=0, step=1)])
    assert svg.count("<pattern") == len(HATCHES) == REASONS_TOLD + 1
    assert f">{OTHER}</text>" in svg
    assert ">reason 9</text>" in svg


def test_words_are_escaped_and_nothing_is_loaded() -> None:
    svg = picture([dense('<b> & "no" ]]>', branch="<a>")])
    assert "<b>" not in svg
    assert rectangles(svg)[0][1] == 'layer 0, step 0: dense: <b> & "no" ]]>, native'
    assert not re.findall(r"href|@import|https?://(?!www\.w3\.org/2000/svg)", svg)
    assert 'aria-label="Attention by layer and step: 0 sparse calls, 1 dense."' in svg


@pytest.mark.parametrize(("layers", "steps"), [(1, 1), (80, 3), (2, 1000)])
def test_everything_is_inside_the_picture(layers: int, steps: int) -> None:
    svg = picture(
        [record(layer=layer, step=step, density=step / steps) for layer in range(layers) for step in range(steps)]
    )
    root = ET.fromstring(svg)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for element in root.iter("{*}rect"):
        right = float(element.attrib.get("x", 0)) + float(element.attrib["width"])
        bottom = float(element.attrib.get("y", 0)) + float(element.attrib["height"])
        assert right <= width
        assert bottom <= height
    labels = [text for element in root.iter("{*}text") if (text := element.text) and text.isdigit()]
    assert len(labels) <= 40 + 80


def test_a_report_draws_its_calls_and_has_none_before_a_run() -> None:
    settings = {"method": Radial(), "schedule": Schedule(), "forward_seconds": None, "plan": None, "choice": None}
    calls = [record(layer=layer) for layer in (0, 1)]
    assert Report(calls=calls, **settings).picture() == picture(calls)
    with pytest.raises(ValueError, match="run the pipeline first"):
        Report(calls=[], **settings).picture()
