"""Pictures of a comparison's page: attention decay as SVG, block maps as PNG."""

from __future__ import annotations

import base64
import io
import math
from html import escape

import numpy as np
from numpy.typing import NDArray

from falloff.evaluation.decay import AXES, DecayCurve

WIDTH, HEIGHT = 440, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 52
MAP_COLOUR = (15, 130, 122)


def decay_plot(curve: DecayCurve) -> str:
    """Mean attention against distance on a logarithmic scale, as an SVG element coloured by the page's styles."""
    shown = [value for value in (*curve.mean, curve.uniform) if value > 0]
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)))
    scale = _Scale(max(curve.distance) or 1, low, max(high, low + 1))
    parts = [
        *(y_tick(scale.y(10.0**decade), _power(decade)) for decade in range(scale.low, scale.high + 1)),
        *(x_tick(scale.x(x), str(x)) for x in _ticks(scale.reach)),
        *(_line(scale, curve.distance, layer, "layer") for layer in curve.layers),
        _line(scale, [0, scale.reach], [curve.uniform] * 2, "uniform"),
        *([_line(scale, *_fitted(curve), "fit")] if curve.fit else []),
        *(
            f'<circle class="mean" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.2"/>'
            for x, y in zip(curve.distance, curve.mean, strict=True)
            if y > 0
        ),
        *axes(AXES[curve.axis], "mean attention"),
    ]
    return plot(parts, f"Mean attention against {AXES[curve.axis]}. {fit_words(curve)}")


STYLE = (
    ".plot{--page:#fff;--ink:#1b1e22;--soft:#5b626a;--line:#dfe1df;--data:#0f827a;--warm:#a8480f;"
    'background:var(--page);font:12px system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}'
    "@media(prefers-color-scheme:dark){.plot{--page:#1b1f22;--ink:#e9ebec;--soft:#a3abb2;--line:#32383d;"
    "--data:#2fb3a8;--warm:#f0a066}}"
    ".plot text{fill:var(--soft)}.plot .tick{text-anchor:middle}.plot .end{text-anchor:end}"
    ".plot .axis{text-anchor:middle;fill:var(--ink);font-size:13px}.plot .grid{stroke:var(--line)}"
    ".plot polyline{fill:none}.layer{stroke:var(--soft);opacity:.38}"
    ".fit{stroke:var(--warm);stroke-width:2;stroke-dasharray:7 4}"
    ".uniform{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:2 4}.mean{fill:var(--data)}"
)
"""What the page's styles say of plots, for those in a file of their own."""


def alone(drawing: str) -> str:
    """A plot as the content of an SVG file, which needs no page."""
    start, rest = drawing.split(">", 1)
    return f'{start} xmlns="http://www.w3.org/2000/svg"><style>{STYLE}</style>{rest}\n'


def plot(parts: list[str], label: str) -> str:
    """An SVG element of the drawing's size."""
    words = escape(label, quote=True)
    return f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">{"".join(parts)}</svg>'


def axes(across: str, up: str) -> list[str]:
    """What the two axes show."""
    return [
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}">{escape(across)}</text>',
        f'<text class="axis" transform="translate(14 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)">{escape(up)}</text>',
    ]


def y_tick(y: float, text: str) -> str:
    """A line across the drawing, named at its left end."""
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="tick end" x="{LEFT - 7}" y="{y + 4:.1f}">{text}</text>'
    )


def x_tick(x: float, text: str) -> str:
    """A number below the drawing."""
    return f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}">{text}</text>'


def fit_words(curve: DecayCurve) -> str:
    """The fitted exponential in words."""
    if curve.fit is None:
        return "Too few distances for a fit."
    return f"y = exp(-a x + b): a = {curve.fit.a:.3f}, b = {curve.fit.b:.2f}, R² = {curve.fit.r2:.3f}"


def block_map_png(block_map: NDArray[np.uint8]) -> str:
    """A map (255: all pairs computed) as a PNG data URI: one colour, opaque where pairs are computed."""
    from PIL import Image

    colour = np.broadcast_to(np.array(MAP_COLOUR, np.uint8), (*block_map.shape, 3))
    image = Image.fromarray(np.concatenate([colour, block_map[..., None]], -1), "RGBA")
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return data_uri("image/png", file.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class _Scale:
    """Distances and attention to places in the drawing."""

    def __init__(self, reach: int, low: int, high: int) -> None:
        self.reach, self.low, self.high = reach, low, high

    def x(self, distance: float) -> float:
        return LEFT + distance / self.reach * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Values below the scale lie on its floor."""
        share = (math.log10(max(value, 10.0**self.low)) - self.low) / (self.high - self.low)
        return TOP + (1 - min(share, 1.0)) * (HEIGHT - TOP - BOTTOM)


def _fitted(curve: DecayCurve) -> tuple[list[float], list[float]]:
    assert curve.fit is not None
    distances = np.linspace(0, max(curve.distance), 80)
    return distances.tolist(), np.exp(-curve.fit.a * distances + curve.fit.b).tolist()


def _line(scale: _Scale, distances: list[float] | list[int], values: list[float], kind: str) -> str:
    points = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in zip(distances, values, strict=True) if y > 0)
    return f'<polyline class="{kind}" points="{points}"/>'


def _ticks(reach: int) -> list[int]:
    """At most nine round distances from 0."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, reach) if reach / step <= 8)
    return list(range(0, reach + 1, step))


def _power(decade: int) -> str:
    digits = str(decade).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return "1" if decade == 0 else f"10{digits}"
