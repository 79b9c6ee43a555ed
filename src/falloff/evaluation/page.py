"""What pages of a comparison share: their frame and styles, tables and lists. A page needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from falloff.evaluation.charts import decay_plot, fit_words

if TYPE_CHECKING:
    from falloff.evaluation.decay import DecayCurve
    from falloff.evaluation.figures import Row

BYTES = 13 << 20
"""Videos or pictures embedded in a page, before base64: the page stays below 20 MB."""


def frame(
    *,
    title: str,
    heading: str,
    subtitle: str,
    content: str,
    settings: Mapping[str, str],
    machine: Mapping[str, str],
    command: str,
) -> str:
    """A whole page. ``content`` is HTML, all else is text."""
    return template("page.html").substitute(
        title=escape(title),
        heading=escape(heading),
        subtitle=escape(subtitle),
        content=content,
        settings=definitions(settings),
        machine=definitions(machine),
        command=escape(command),
    )


def template(name: str) -> Template:
    """A file of this package with places to fill."""
    return Template(resources.files("falloff.evaluation").joinpath(name).read_text(encoding="utf-8"))


def headline(name: str, stats: Mapping[str, tuple[str, str]], verdict: str) -> str:
    """A card with few large figures, each a value and a note by its name."""
    shown = "".join(
        f"<div><dt>{escape(stat)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for stat, (value, note) in stats.items()
    )
    return (
        f'<section class="card headline"><h3>{escape(name)}</h3><dl class="stats">{shown}</dl>'
        f"<p>{escape(verdict)}</p></section>"
    )


def figures_table(columns: Sequence[str], rows: Iterable[Row]) -> str:
    heads = "".join(f'<th scope="col">{escape(head)}</th>' for head in columns)
    body = "".join(
        f'<tr><th scope="row">{row.name}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row.cells)}</tr>'
        for row in rows
    )
    return f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{body}</tbody></table>"


def decay_plots(curves: Iterable[DecayCurve]) -> str:
    """Attention by distance, with a key to the marks."""
    plots = "".join(
        f'<figure class="card">{decay_plot(curve)}<figcaption>{escape(fit_words(curve))}</figcaption></figure>'
        for curve in curves
    )
    keys = {
        "mean of all layers": '<circle class="mean" cx="17" cy="5" r="4"/>',
        "exponential fit": '<polyline class="fit" points="0,5 34,5"/>',
        "single layers": '<polyline class="layer" points="0,5 34,5"/>',
        "attention spread evenly": '<polyline class="uniform" points="0,5 34,5"/>',
    }
    key = "".join(
        f'<li><svg viewBox="0 0 34 10" aria-hidden="true">{mark}</svg>{name}</li>' for name, mark in keys.items()
    )
    return f'<ul class="key">{key}</ul><div class="plots">{plots}</div>'


def definitions(entries: Mapping[str, str]) -> str:
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in entries.items())


def words(values: Mapping[str, object]) -> str:
    """Settings in a line."""
    return ", ".join(f"{name} = {value}" for name, value in values.items())
