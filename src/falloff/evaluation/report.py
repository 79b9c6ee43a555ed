"""A comparison as files: one page that needs nothing else, its figures as JSON, and the videos."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path
from statistics import fmean

from falloff.evaluation import figures, files, page, pareto
from falloff.evaluation.charts import block_map_png, data_uri
from falloff.evaluation.comparison import Arm, Comparison, MethodArm
from falloff.evaluation.video import as_file, is_picture, read, shrink

LARGE_VIDEO_BYTES = 1 << 20
"""Videos above this are embedded at a smaller size."""
SHRUNK_SIDE = 480


def write(comparison: Comparison, folder: Path) -> list[Path]:
    """Write ``compare.html``, ``compare.json`` and every video into a folder, made if need be.

    Returns the paths, the page first. Raises ``OSError`` when the folder cannot be written to.
    """
    files.check_writable(folder)
    contents: dict[str, bytes | str] = {
        "compare.html": html(comparison),
        "compare.json": json.dumps(comparison.to_dict(), indent=2, allow_nan=False) + "\n",
    }
    for arm in (comparison.dense, *comparison.methods):
        for pair, video in enumerate(arm.videos):
            contents[file_name(arm, pair)] = video
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        files.write(folder / name, content)
    return [folder / name for name in contents]


def file_name(arm: Arm, pair: int) -> str:
    """Name of the file with an arm's video or picture of a pair, counted from 0."""
    suffix = "png" if is_picture(arm.videos[pair]) else "mp4"
    return f"{pair + 1:02d}-{re.sub('[^A-Za-z0-9.]+', '-', arm.label).strip('-')}.{suffix}"


def html(comparison: Comparison) -> str:
    """The page, self-contained: styles, script, videos, maps and plots are all inside."""
    parts = {
        "headlines": "".join(_headline(comparison, arm) for arm in comparison.methods),
        "kind": "Pictures" if is_picture(comparison.dense.videos[0]) else "Videos",
        "videos": _videos(comparison),
        "pareto": _pareto(comparison),
        "figures": page.figures_table(figures.columns(comparison), figures.rows(comparison)),
        "meanings": page.definitions({row.name: row.meaning for row in figures.rows(comparison)}),
        "maps": _maps(comparison),
        "runs": _runs(comparison),
        "reasons": _reasons(comparison),
        "decay": _decay(comparison),
    }
    return page.frame(
        title=f"falloff: {', '.join(arm.label for arm in comparison.methods)} against dense",
        heading="What sparse attention gained, and what it cost",
        subtitle=_subtitle(comparison),
        content=page.template("report.html").substitute(parts),
        settings=_settings(comparison),
        machine={**comparison.machine, **comparison.versions},
        command=comparison.command,
    )


def _subtitle(comparison: Comparison) -> str:
    pairs = len(comparison.pairs)
    count = "1 pair" if pairs == 1 else f"{pairs} pairs"
    return f"{comparison.model}, {count} of prompt and seed, {comparison.created}"


def _headline(comparison: Comparison, arm: MethodArm) -> str:
    stats = {
        "Speed-up": (figures.times(comparison.speedup(arm)), "of the whole call, against dense"),
        "PSNR against dense": (
            figures.mean_decibels(arm.psnr),
            f"noise floor: {figures.mean_decibels(comparison.dense.psnr)}",
        ),
        "SSIM against dense": (
            f"{fmean(arm.ssim):.3f}",
            f"noise floor: {fmean(comparison.dense.ssim):.3f}",
        ),
        "Attention computed": (
            figures.percent(arm.density),
            f"{figures.percent(arm.effective_density)} with the dense steps and layers",
        ),
    }
    return page.headline(arm.label, stats, figures.verdict(comparison, arm))


def _videos(comparison: Comparison) -> str:
    """Pair after pair, as many as the page has room for."""
    arms: list[Arm] = [comparison.dense, *comparison.methods]
    room, shown = page.BYTES, []
    for number, pair in enumerate(comparison.pairs):
        videos = [_small(arm.videos[number], comparison.fps) for arm in arms]
        room -= sum(map(len, videos))
        if room < 0:
            left = len(comparison.pairs) - number
            shown.append(f"<p>{left} more of {len(comparison.pairs)} pairs are in the folder beside this page.</p>")
            break
        both = zip(arms, videos, strict=True)
        cards = "".join(_video_card(arm, number, video, pair.prompt) for arm, video in both)
        shown.append(
            f'<h3>{escape(pair.prompt)} <span class="soft">seed {pair.seed}</span></h3>'
            f'<div class="videos">{cards}</div>'
        )
    return "".join(shown)


def _video_card(arm: Arm, pair: int, video: bytes, prompt: str) -> str:
    label = escape(f"{arm.label}: {prompt}", quote=True)
    words = figures.seconds(arm.seconds[pair])
    if isinstance(arm, MethodArm):
        words += f", PSNR {figures.decibels([arm.psnr[pair]])}, SSIM {figures.similarity([arm.ssim[pair]])}"
    if is_picture(video):
        shown = f'<img src="{data_uri("image/png", video)}" alt="{label}">'
    else:
        shown = f'<video src="{data_uri("video/mp4", video)}" aria-label="{label}" loop muted playsinline></video>'
    return f'<figure class="card">{shown}<figcaption><b>{escape(arm.label)}</b>{words}</figcaption></figure>'


def _small(video: bytes, fps: float) -> bytes:
    if len(video) <= LARGE_VIDEO_BYTES:
        return video
    return as_file(shrink(read(video), SHRUNK_SIDE), fps)


def _pareto(comparison: Comparison) -> str:
    drawn = [plot for plot in (pareto.by_density(comparison), pareto.by_time(comparison)) if plot]
    if not drawn:
        return "<p>Every method's videos equal the dense ones.</p>"
    plots = "".join(f'<figure class="card">{plot}</figure>' for plot in drawn)
    return (
        "<p>Up and left is better: closer to the dense video, for less. The line joins methods that none other beats "
        "in both; bars reach from the worst pair of prompt and seed to the best.</p>"
        f'<div class="plots">{plots}</div><dl class="meanings">{page.definitions(pareto.key(comparison))}</dl>'
    )


def _maps(comparison: Comparison) -> str:
    intro = (
        "<p>Rows are queries, columns are keys, in the order that blocks are cut from. "
        '<span class="soft">Share of token pairs computed: 0%<span class="ramp"></span>100%</span></p>'
    )
    return f'{intro}<div class="maps">{"".join(map(_map, comparison.methods))}</div>'


def _map(arm: MethodArm) -> str:
    caption = f"{arm.label}: {figures.percent(arm.density)} of all token pairs"
    if arm.block_map is None:
        return f'<figure class="card"><figcaption>{escape(arm.label)}: every call stayed dense</figcaption></figure>'
    return (
        f'<figure class="card"><div class="map"><span class="down">queries</span>'
        f'<img src="{block_map_png(arm.block_map)}" alt="Block map of {escape(caption, quote=True)}">'
        f'<span class="across">keys</span></div><figcaption>{escape(caption)}</figcaption></figure>'
    )


def _runs(comparison: Comparison) -> str:
    intro = "<p>The last run of each method. Point at a field for its kernel and time.</p>"
    runs = "".join(
        f'<figure class="card">{arm.run_picture}<figcaption>{escape(arm.label)}</figcaption></figure>'
        for arm in comparison.methods
    )
    return f'{intro}<div class="runs">{runs}</div>'


def _reasons(comparison: Comparison) -> str:
    found = [(arm.label, why, count) for arm in comparison.methods for why, count in arm.reasons.items()]
    if not found:
        return "<p>None.</p>"
    body = "".join(
        f'<tr><th scope="row">{escape(label)}</th><td class="text">{escape(why)}</td><td>{count}</td></tr>'
        for label, why, count in found
    )
    heads = '<th scope="col">method</th><th scope="col" class="text">reason</th><th scope="col">calls</th>'
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="card scroll" tabindex="0" role="region" aria-label="Dense calls">{table}</div>'


def _decay(comparison: Comparison) -> str:
    if not comparison.decay:
        return "<p>No attention call was seen.</p>"
    intro = (
        "<p>Mean attention of sampled queries in the dense run, by distance to the key. Sparse attention with a "
        "reach that shrinks with distance rests on this fall: the steeper, the less it leaves out.</p>"
    )
    return intro + page.decay_plots(comparison.decay)


def _settings(comparison: Comparison) -> dict[str, str]:
    found = {"pipeline call": page.words(comparison.call_arguments) or "the pipeline's defaults"}
    for arm in comparison.methods:
        found[arm.label] = "; ".join(filter(None, (page.words(arm.settings), page.words(arm.schedule))))
    return found
