"""A comparison as files: one page that needs nothing else, its figures as JSON, the pictures, and attention drawn."""

from __future__ import annotations

import json
import re
import struct
from html import escape
from pathlib import Path

from falloff.evaluation import figures as shared
from falloff.evaluation import files, page
from falloff.evaluation.charts import alone, block_map_png, data_uri, decay_plot
from falloff.evaluation.decoding import figures
from falloff.evaluation.decoding.comparison import Arm, Asked, Comparison

SMALL = 128  # px: below this pictures are shown with square pixels


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.html``, ``compare.json``, ``attention.svg`` and every picture into a folder, made if need be.

    Returns the paths, the page first. Raises ``OSError`` when the folder cannot be written to.
    """
    files.check_writable(folder)
    contents: dict[str, bytes | str] = {
        "compare.html": html(comparison),
        "compare.json": json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n",
        "attention.svg": alone(decay_plot(comparison.attention)),
    }
    for arm in comparison.arms:
        for asked, picture in zip(comparison.asked, arm.pictures, strict=True):
            contents[picture_name(arm, asked)] = picture
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write(folder / name, content)
    return [folder / name for name in contents]


def picture_name(arm: Arm, asked: Asked) -> str:
    return f"class-{asked.label}-seed-{asked.seed}-{re.sub('[^A-Za-z0-9]+', '-', arm.label)}.png"


def html(comparison: Comparison) -> str:
    """The page, self-contained."""
    rows = figures.rows(comparison)
    parts = {
        "headlines": "".join(_headline(comparison, arm) for arm in comparison.parallel),
        "pictures": _pictures(comparison),
        "figures": page.figures_table(figures.columns(comparison), rows),
        "meanings": page.definitions({row.name: row.meaning for row in rows}),
        "groups": _groups(comparison),
        "attention": _attention(comparison),
    }
    return page.frame(
        title=f"falloff: {comparison.parallel[0].steps} steps against {comparison.sequential.steps}",
        heading="What fewer steps gained, and what they cost",
        subtitle=f"{comparison.model}, {figures.pictures(len(comparison.asked))} by each way, {comparison.created}",
        content=page.template("decoding/report.html").substitute(parts),
        settings={
            "pipeline call": page.words(comparison.call_arguments),
            **{arm.label: f"order = {arm.order}, sizes = {_sizes(arm)}" for arm in comparison.arms},
        },
        machine={**comparison.machine, **comparison.versions},
        command=comparison.command,
    )


def _sizes(arm: Arm) -> str:
    return "all 1" if set(arm.sizes) == {1} else " ".join(map(str, arm.sizes))


def _headline(comparison: Comparison, arm: Arm) -> str:
    stats = {
        "Times faster": (shared.times(comparison.speedup(arm)), "a picture alone, against sequential"),
        "Steps": (str(arm.steps), f"sequential: {comparison.sequential.steps}"),
    }
    before, after = comparison.sequential.scores, arm.scores
    if before is not None and after is not None:
        stats["Read as asked"] = (shared.percent(after.accuracy), f"sequential: {shared.percent(before.accuracy)}")
        if after.frechet is not None:
            stats["Frechet distance"] = (
                figures.distance(arm),
                f"sequential: {figures.distance(comparison.sequential)}",
            )
    if comparison.chance is not None:
        stats["Tokens kept"] = (figures.agreement(arm), f"by chance: {shared.percent(comparison.chance)}")
    return page.headline(arm.label, stats, figures.verdict(comparison, arm))


def _pictures(comparison: Comparison) -> str:
    """One of class and seed after the other, as many as the page has room for."""
    room, shown = page.BYTES, []
    for number, asked in enumerate(comparison.asked):
        room -= sum(len(arm.pictures[number]) for arm in comparison.arms)
        if room < 0:
            total = len(comparison.asked)
            shown.append(
                f"<p>{total - number} more of {total} pictures by each way are in the folder beside this page.</p>"
            )
            break
        cards = "".join(_card(arm, number, asked) for arm in comparison.arms)
        shown.append(
            f'<h3>class {asked.label} <span class="soft">seed {asked.seed}</span></h3>'
            f'<div class="pictures">{cards}</div>'
        )
    return "".join(shown)


def _card(arm: Arm, number: int, asked: Asked) -> str:
    picture = arm.pictures[number]
    label = escape(f"class {asked.label}, seed {asked.seed}, {arm.label}", quote=True)
    kind = ' class="small"' if _width(picture) < SMALL else ""
    return (
        f'<figure class="card"><img{kind} src="{data_uri("image/png", picture)}" alt="{label}">'
        f"<figcaption><b>{escape(arm.label)}</b>{shared.seconds(arm.seconds[number])}</figcaption></figure>"
    )


def _width(png: bytes) -> int:
    """In pixels: the first number of a PNG's first chunk."""
    width: int = struct.unpack(">I", png[16:20])[0]
    return width


def _groups(comparison: Comparison) -> str:
    maps = "".join(
        f'<figure class="card"><img src="{block_map_png(arm.groups)}" alt="Steps of each token, {escape(arm.label)}">'
        f"<figcaption>{escape(arm.label)}</figcaption></figure>"
        for arm in comparison.arms
    )
    return (
        "<p>The first picture's tokens, the darker the earlier. Tokens of a step are drawn without knowing one "
        "another: neighbours of one shade may not fit together, and cells far from any known one are guesses.</p>"
        f'<div class="maps small">{maps}</div>'
    )


def _attention(comparison: Comparison) -> str:
    intro = (
        "<p>Mean attention of a query to one known token, by the distance between them. Locality-aware orders rest on "
        "this fall: a token needs its neighbours most, and the steeper the fall, the less those of a step miss one "
        "another.</p>"
    )
    return intro + page.decay_plots([comparison.attention])
