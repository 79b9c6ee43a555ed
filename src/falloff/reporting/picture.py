"""A run as one picture: layers down, steps across, colour for density, hatching for dense calls by their reason.

An SVG file that needs nothing else, in light and dark; pages may hold it as it is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

from falloff.reporting.record import Record

WIDTH = 720
LEFT, RIGHT, TOP = 58, 14, 26
ROW_HEIGHT = {"least": 4.0, "most": 14.0, "panel": 320.0}
WIDEST_CELL = 28.0
REASONS_TOLD = 6
"""Reasons with a hatching of their own; the rarer ones share the last."""
OTHER = "other reasons"
HATCHES = (
    ("#a8480f", 45),
    ("#5a62b5", 135),
    ("#8a7a1c", 90),
    ("#a03a7a", 0),
    ("#4d7a2a", 25),
    ("#7a5a3a", 155),
    ("#808080", 65),
)
"""Colour and angle of the hatching of each reason, the most frequent one's first."""
STYLE = (
    ".falloff-run{--page:#fff;--ink:#1b1e22;--soft:#5b626a;--line:#dfe1df;--data:#0f827a;"
    'font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}'
    "@media(prefers-color-scheme:dark){.falloff-run{--page:#1b1f22;--ink:#e9ebec;--soft:#a3abb2;--line:#32383d;"
    "--data:#2fb3a8}}"
    ".falloff-run .page{fill:var(--page)}.falloff-run .frame{fill:none;stroke:var(--line)}"
    ".falloff-run .sparse{fill:var(--data)}.falloff-run text{fill:var(--soft)}"
    ".falloff-run .name{fill:var(--ink);font-weight:600}.falloff-run .end{text-anchor:end}"
    ".falloff-run .middle{text-anchor:middle}"
)


class Cell(NamedTuple):
    """What one layer did at one step; what makes two cells look alike."""

    density: float
    kernel: str
    reason: str | None


@dataclass(frozen=True)
class Panel:
    """One drawing: the calls of a model and of the branches that did the same. Steps nobody could tell are ``None``."""

    name: str
    cells: Mapping[tuple[int, int | None], Cell]
    """By layer and step."""
    milliseconds: Mapping[tuple[int, int | None], float]
    layers: int
    steps: Sequence[int | None]

    @property
    def cell_width(self) -> float:
        return min((WIDTH - LEFT - RIGHT) / len(self.steps), WIDEST_CELL)

    @property
    def cell_height(self) -> float:
        return min(max(ROW_HEIGHT["panel"] / self.layers, ROW_HEIGHT["least"]), ROW_HEIGHT["most"])

    @property
    def height(self) -> float:
        """With its name above and its steps below."""
        return TOP + self.layers * self.cell_height + 40


def picture(calls: Sequence[Record]) -> str:
    """The calls of one run as an SVG element. Where a layer was called twice in a step, the last call counts.

    One panel for each model, and for each branch where branches did different things.
    """
    drawn = panels(calls)
    hatches = _hatches(calls)
    legend_top = sum(panel.height for panel in drawn)
    height = legend_top + 18 * (len(set(hatches.values())) + 1) + 12
    parts, top = [], 0.0
    for panel in drawn:
        parts.append(f'<g transform="translate(0 {top:g})">{_panel(panel, hatches)}</g>')
        top += panel.height
    words = escape(_words(calls), quote=True)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="falloff-run" viewBox="0 0 {WIDTH} {height:g}" '
        f'width="{WIDTH}" height="{height:g}" role="img" aria-label="{words}"><style>{STYLE}</style>'
        f'<defs>{_patterns(hatches)}</defs><rect class="page" width="{WIDTH}" height="{height:g}" rx="8"/>'
        f'{"".join(parts)}<g transform="translate(0 {legend_top:g})">{_legend(hatches)}</g></svg>'
    )


def panels(calls: Sequence[Record]) -> list[Panel]:
    """The drawings of a run, in the order of models and branches; branches that did the same share one."""
    models = sorted({call.model for call in calls})
    found = []
    for model in models:
        alike: dict[frozenset[tuple[tuple[int, int | None], Cell]], list[str | None]] = {}
        for branch in dict.fromkeys(call.branch for call in calls if call.model == model):
            alike.setdefault(frozenset(_cells(calls, model, branch).items()), []).append(branch)
        for branches in alike.values():
            found.append(_gathered(calls, model, branches, name_model=len(models) > 1))
    return found


def _gathered(calls: Sequence[Record], model: int, branches: list[str | None], *, name_model: bool) -> Panel:
    of_panel = [call for call in calls if call.model == model and call.branch in branches]
    steps = sorted({call.step for call in of_panel if call.step is not None})
    unknown: list[None] = [None] if any(call.step is None for call in of_panel) else []
    names = [f"transformer {model + 1}"] if name_model else []
    names += [" and ".join(branch for branch in branches if branch is not None)]
    by_place: dict[tuple[int, int | None], list[float]] = {}
    for call in of_panel:
        if call.attention_seconds is not None:
            by_place.setdefault((call.layer, call.step), []).append(1000 * call.attention_seconds)
    return Panel(
        name=", ".join(filter(None, names)),
        cells=_cells(calls, model, branches[0]),
        milliseconds={place: fmean(values) for place, values in by_place.items()},
        layers=max(call.layer for call in of_panel) + 1,
        steps=[*steps, *unknown],
    )


def _cells(calls: Sequence[Record], model: int, branch: str | None) -> dict[tuple[int, int | None], Cell]:
    return {
        (call.layer, call.step): Cell(round(call.density, 3), call.kernel, call.reason)
        for call in calls
        if call.model == model and call.branch == branch
    }


def _hatches(calls: Sequence[Record]) -> dict[str, int]:
    """The number of its hatching for every reason."""
    counts = Counter(call.reason for call in calls if call.reason is not None)
    return {reason: min(place, REASONS_TOLD) for place, (reason, _) in enumerate(counts.most_common())}


def _patterns(hatches: Mapping[str, int]) -> str:
    return "".join(
        f'<pattern id="falloff-dense-{number}" width="6" height="6" patternUnits="userSpaceOnUse" '
        f'patternTransform="rotate({angle})"><rect width="6" height="6" fill="{colour}" opacity=".28"/>'
        f'<rect width="2" height="6" fill="{colour}"/></pattern>'
        for number, (colour, angle) in enumerate(HATCHES)
        if number in hatches.values()
    )


def _panel(panel: Panel, hatches: Mapping[str, int]) -> str:
    width, height = panel.cell_width, panel.cell_height
    bottom = TOP + panel.layers * height
    every_layer, every_step = _apart(panel.layers, height, 14), _apart(len(panel.steps), width, 30)
    frame = (
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{len(panel.steps) * width:g}" '
        f'height="{panel.layers * height:g}"/>'
    )
    return "".join(
        [
            f'<text class="name" x="{LEFT}" y="{TOP - 9}">{escape(panel.name)}</text>',
            *(_row(panel, layer, hatches) for layer in range(panel.layers)),
            frame,
            *(
                f'<text class="end" x="{LEFT - 6}" y="{TOP + (layer + 0.5) * height + 4:g}">{layer}</text>'
                for layer in range(0, panel.layers, every_layer)
            ),
            *(
                f'<text class="middle" x="{LEFT + (place + 0.5) * width:g}" y="{bottom + 15:g}">'
                f"{'?' if panel.steps[place] is None else panel.steps[place]}</text>"
                for place in range(0, len(panel.steps), every_step)
            ),
            f'<text x="{LEFT}" y="{bottom + 31:g}">step</text>',
            f'<text transform="translate(16 {TOP + panel.layers * height / 2 + 16:g}) rotate(-90)">layer</text>',
        ]
    )


def _row(panel: Panel, layer: int, hatches: Mapping[str, int]) -> str:
    """One rectangle for neighbouring steps that did the same."""
    drawn, start = [], 0
    for cell, steps in groupby(panel.steps, key=lambda step: panel.cells.get((layer, step))):
        count = len(list(steps))
        if cell is not None:
            drawn.append(_rectangle(panel, layer, start, count, cell, hatches))
        start += count
    return "".join(drawn)


def _rectangle(panel: Panel, layer: int, start: int, count: int, cell: Cell, hatches: Mapping[str, int]) -> str:
    steps = panel.steps[start : start + count]
    times = [panel.milliseconds[layer, step] for step in steps if (layer, step) in panel.milliseconds]
    where = f"step {steps[0]}" if count == 1 else f"steps {steps[0]} to {steps[-1]}"
    what = f"{cell.density:.1%} of the pairs" if cell.reason is None else f"dense: {cell.reason}"
    took = f", {fmean(times):.3g} ms a call" if times else ""
    words = escape(f"layer {layer}, {where}: {what}, {cell.kernel}{took}")
    paint = _sparse(cell.density) if cell.reason is None else f'fill="url(#falloff-dense-{hatches[cell.reason]})"'
    return (
        f'<rect {paint} x="{LEFT + start * panel.cell_width:g}" y="{TOP + layer * panel.cell_height:g}" '
        f'width="{count * panel.cell_width:g}" height="{panel.cell_height:g}"><title>{words}</title></rect>'
    )


def _sparse(density: float) -> str:
    """The less is computed, the paler, and yet to be told from nothing at all."""
    return f'class="sparse" fill-opacity="{0.1 + 0.9 * density:.3g}"'


def _legend(hatches: Mapping[str, int]) -> str:
    names = {number: reason for reason, number in hatches.items()}
    if len(hatches) > REASONS_TOLD + 1:
        names[REASONS_TOLD] = OTHER
    ramp = [f'<rect {_sparse(step / 9)} x="{LEFT + 8 * step}" y="0" width="8" height="12"/>' for step in range(10)]
    words = "sparse: 0% to 100% of the pairs computed" + ("; hatched: dense, because" if hatches else "")
    lines = [*ramp, f'<text x="{LEFT + 90}" y="10">{words}</text>']
    for place, number in enumerate(sorted(names), start=1):
        lines.append(
            f'<rect fill="url(#falloff-dense-{number})" x="{LEFT}" y="{18 * place}" width="80" height="12"/>'
            f'<text x="{LEFT + 90}" y="{18 * place + 10}">{escape(names[number])}</text>'
        )
    return "".join(lines)


def _words(calls: Sequence[Record]) -> str:
    dense = sum(call.reason is not None for call in calls)
    return f"Attention by layer and step: {len(calls) - dense} sparse calls, {dense} dense."


def _apart(count: int, size: float, room: int) -> int:
    """Every how many of ``count`` places a label fits, so that each has ``room``; a round number."""
    round_numbers = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    return next((step for step in round_numbers if step * size >= room), max(count, 1))
