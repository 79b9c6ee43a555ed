"""What methods gain against what they cost, as a picture: fidelity over effective density, and over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import NamedTuple

from falloff.evaluation import charts, figures
from falloff.evaluation.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH
from falloff.evaluation.comparison import Comparison, MethodArm

TICKS = 6


class Point(NamedTuple):
    """One method: x, its mean PSNR in dB, and the lowest and highest over pairs."""

    label: str
    x: float
    y: float
    low: float
    high: float


def by_density(comparison: Comparison) -> str:
    """PSNR over effective density, in percent, as an SVG element; empty when no method differs from dense."""
    return _plot(comparison, [100 * arm.effective_density for arm in comparison.methods], "effective density, %")


def by_time(comparison: Comparison) -> str:
    """PSNR over the time of the whole call, as a share of dense in percent."""
    shares = [100 / comparison.speedup(arm) for arm in comparison.methods]
    return _plot(comparison, shares, "time of the whole call, % of dense")


def numbers(comparison: Comparison) -> dict[str, int]:
    """The number beside each point, by label: methods that differ from dense, in the table's order."""
    return {arm.label: number for number, arm in enumerate(filter(_finite, comparison.methods), 1)}


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other one beats in both: from left to right, each higher than all before it."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, -point.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def key(comparison: Comparison) -> dict[str, str]:
    """Number and name of every point, with its figures in words."""
    number = numbers(comparison)
    shown = [arm for arm in comparison.methods if arm.label in number]
    return {
        f"{number[arm.label]}. {arm.label}": f"{figures.decibels(arm.psnr)}, effective density "
        f"{figures.percent(arm.effective_density)}, {figures.times(comparison.speedup(arm))}, median over "
        f"{len(comparison.pairs)} pairs, {figures.seconds(median(arm.seconds))}"
        for arm in shown
    }


def _plot(comparison: Comparison, xs: list[float], axis: str) -> str:
    points = [_point(arm, x) for arm, x in zip(comparison.methods, xs, strict=True) if _finite(arm)]
    if not points:
        return ""
    across = _Axis.over([0.0, 100.0, *(point.x for point in points)], LEFT, WIDTH - RIGHT)
    up = _Axis.over([value for point in points for value in (point.low, point.high)], HEIGHT - BOTTOM, TOP)
    number = numbers(comparison)
    line = " ".join(f"{across.at(p.x):.1f},{up.at(p.y):.1f}" for p in front(points))
    parts = [
        *(charts.x_tick(across.at(tick), f"{tick:g}") for tick in across.ticks()),
        *(charts.y_tick(up.at(tick), f"{tick:g}") for tick in up.ticks()),
        f'<polyline class="fit" points="{line}"/>',
        *(_mark(across.at(point.x), up, point, number[point.label]) for point in points),
        *charts.axes(axis, "PSNR against dense, dB"),
    ]
    words = "; ".join(f"{p.label}: {p.y:.1f} dB at {p.x:.0f}" for p in points)
    return charts.plot(parts, f"PSNR over {axis}. {words}")


def _finite(arm: MethodArm) -> bool:
    """Whether a method's videos differ from the dense ones."""
    return any(map(math.isfinite, arm.psnr))


def _point(arm: MethodArm, x: float) -> Point:
    values = [value for value in arm.psnr if math.isfinite(value)]
    return Point(arm.label, x, fmean(values), min(values), max(values))


class _Axis(NamedTuple):
    """Values ``low`` to ``high`` to places ``start`` to ``end`` of the drawing, with ticks at every ``step``."""

    low: float
    high: float
    step: float
    start: float
    end: float

    @staticmethod
    def over(values: Sequence[float], start: float, end: float) -> _Axis:
        least, most = min(values), max(values)
        rough = max(most - least, 1.0) / TICKS
        decade = 10 ** math.floor(math.log10(rough))
        step = next(step * decade for step in (1, 2, 5, 10) if step * decade >= rough)
        first, last = math.floor(least / step), math.ceil(most / step - 1e-9)
        return _Axis(first * step, max(last, first + 1) * step, step, start, end)

    def at(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        return [self.low + place * self.step for place in range(round((self.high - self.low) / self.step) + 1)]


def _mark(x: float, up: _Axis, point: Point, number: int) -> str:
    """The mean with its number, and a bar from the worst pair to the best."""
    y = up.at(point.y)
    return (
        f'<polyline class="layer" points="{x:.1f},{up.at(point.low):.1f} {x:.1f},{up.at(point.high):.1f}"/>'
        f'<circle class="mean" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
        f'<text class="tick" x="{x + 10:.1f}" y="{y - 6:.1f}">{number}</text>'
    )
