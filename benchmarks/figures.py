"""Write the tables of README and docs from the committed results; ``--check`` only tells whether they are up to date.

python benchmarks/figures.py
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from pages import RESULTS, ROOT, source, table
from speed_figures import (
    attention_figures,
    gpu_figures,
    model_figures,
    plan_figures,
    planning_figures,
    seam_figures,
    sla_figures,
)

from falloff.evaluation.figures import highest

PAGES = (
    ROOT / "README.md",
    ROOT / "docs" / "decoding.md",
    ROOT / "docs" / "training.md",
    *sorted((ROOT / "docs" / "methods").glob("*.md")),
)


def miniature_figures() -> str:
    rows, sources = [], []
    for path in sorted(RESULTS.glob("compare-miniature-*.json")):
        result = json.loads(path.read_text())
        frames = result["call_arguments"]["num_frames"]
        dense = result["dense"]
        rows.append([f"{frames} frames, dense", f"{median(dense['seconds']):.1f} s", "1.00x", "", "", "", ""])
        for arm in result["methods"]:
            rows.append(
                [
                    f"{frames} frames, {arm['label']}",
                    f"{median(arm['seconds']):.1f} s",
                    measured_speedup(arm),
                    f"{arm['density']:.1%}",
                    f"{arm['effective_density']:.1%}",
                    f"{decibels(arm['psnr'])} ({decibels(dense['psnr'])})",
                    f"{fmean(arm['ssim']):.3f}",
                ]
            )
        sources.append(source(result, path))
    head = ["miniature", "time", "speed-up", "density", "effective density", "PSNR (noise floor)", "SSIM"]
    return table(head, rows) + "\n\n" + "\n".join(sources)


def quality_figures() -> str:
    path = ROOT / "src" / "falloff" / "miniature" / "measured.json"
    result = json.loads(path.read_text())
    score, psnr = result["prompt_score"], result["psnr_db"]
    of_videos = f"{score['videos']} of {result['prompts_planned']} held-out prompts"
    rows = [
        ["weights on disk", "16 MB at most", f"{result['bytes'] / 1e6:.1f} MB"],
        ["latent tokens by default", "4,000", f"{result['tokens']:,}"],
        ["attention's share of a dense forward", "60%", f"{result['attention_share']:.0%}"],
        ["one dense default generation", "90 s at most", f"{result['generation_seconds']:.0f} s"],
        [f"autoencoder on {psnr['clips']} held-out clips, mean", "30 dB", f"{psnr['mean']:.1f} dB"],
        [f"every asked digit found, {of_videos}", "75%", f"{score['every_digit_found']:.0%}"],
        [f"colour right, {score['digits']} digits", "90%", f"{score['colour_right']:.0%}"],
        [f"direction right, {score['digits']} digits", "80%", f"{score['direction_right']:.0%}"],
    ]
    link = path.relative_to(ROOT)
    machine = result["machine"]
    return (
        table(["", "wanted", "measured"], rows)
        + f"\n\n[{path.name}]({link}): {machine['cpu']}, torch {machine['versions']['torch']}."
    )


def decibels(values: list[float | str]) -> str:
    """Mean of decibels; dense runs that repeat to the bit have an infinite noise floor."""
    mean = fmean(float(value) for value in values)
    return "identical" if mean == float("inf") else f"{mean:.1f} dB"


def methods_figures() -> str:
    """Every method at one density, best first."""
    parts = []
    for path, result in method_results():
        arms = sorted(result["methods"], key=lambda arm: -fmean(map(float, arm["psnr"])))
        parts += [
            f"**{result['call_arguments']['num_frames']} frames**, the first quarter of the steps dense:",
            table(METHOD_HEAD, [method_row(arm) for arm in arms]),
            source(result, path, "../../"),
        ]
    return "\n\n".join(parts)


def method_figures(name: str) -> str:
    """One method's rows."""
    rows, sources = [], []
    for path, result in method_results():
        frames = result["call_arguments"]["num_frames"]
        found = [arm for arm in result["methods"] if arm["method"] == name]
        rows += [[f"{frames} frames, {row[0]}", *row[1:]] for row in map(method_row, found)]
        sources += [source(result, path, "../../")] if found else []
    return table(METHOD_HEAD, rows) + "\n\n" + "\n".join(sources)


def arms_figures(name: str) -> str:
    """A comparison of a few settings, with the range of their speed-ups."""
    path = RESULTS / f"{name}-miniature-065.json"
    result = json.loads(path.read_text())
    rows = []
    for arm in result["methods"]:
        label, *figures, speedup, planning = method_row(arm)
        low, high = min(arm["speedups"]), max(arm["speedups"])
        rows.append([label, *figures, f"{speedup} ({low:.2f} to {high:.2f})", planning])
    told = f"{len(result['pairs'])} prompts of the miniature, 65 frames:"
    return "\n\n".join([told, table(METHOD_HEAD, rows), source(result, path, "../../")])


METHOD_HEAD = ["method", "density", "effective", "attention kept", "PSNR", "speed-up", "planning, of the time"]


def method_results() -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(RESULTS.glob("methods-miniature-*.json")):
        yield path, json.loads(path.read_text())


BUSY = 0.05
"""Share of the processors that others took from which on it is told beside a time."""


def measured_speedup(arm: dict[str, Any]) -> str:
    taken = highest(arm.get("others", [])) or 0.0  # results of before do not tell
    busy = f" (others took {taken:.0%} of the processors)" if taken > BUSY else ""
    return f"{arm['speedup']:.2f}x{busy}"


def method_row(arm: dict[str, Any]) -> list[str]:
    return [
        arm["label"],
        f"{arm['density']:.1%}",
        f"{arm['effective_density']:.1%}",
        f"{arm['recall']:.1%}",
        decibels(arm["psnr"]),
        measured_speedup(arm),
        f"{arm['plan_seconds'] / fmean(arm['seconds']):.1%}",
    ]


def decoding_figures() -> str:
    """The image miniature: quality and time of each way, then costs and orders; nothing before it was measured."""
    path = RESULTS / "lpd-cpu.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    parts = [ways_table(result), costs_table(result), orders_table(result)]
    if result["xl"]:
        parts.append(xl_table(result["xl"]))
    return "\n\n".join([*parts, source(result, path, "../")])


def ways_table(result: dict[str, Any]) -> str:
    rows = [
        [name, "", f"{row['accuracy']:.1%}", f"{row['frechet']:.3f}", "", ""] for name, row in result["limits"].items()
    ]
    for name, row in result["ways"].items():
        alone = result["alone"][name]
        rows.append(
            [
                name,
                str(row["num_inference_steps"]),
                f"{row['accuracy']:.1%}",
                f"{row['frechet']:.3f}",
                f"{median(alone['seconds']):.2f} s",
                f"{alone['times_faster']:.1f}x",
            ]
        )
    head = ["miniature", "steps", "read as asked", "Frechet distance", "one picture", "times faster"]
    pictures = next(iter(result["ways"].values()))["pictures"]
    return table(head, rows) + f"\n\n{pictures} pictures by each way, read by a classifier of the real scans."


def costs_table(result: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['steps']} steps",
            f"{row['rows']:,}",
            f"{row['flops'] / 1e9:.2f} GFLOP",
            f"{row['cache_bytes'] / 2**20:.1f} MiB",
            "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f} MiB",
        ]
        for row in result["costs"]
    ]
    return table(["a guided picture", "rows", "computed", "cache", "peak beyond the weights"], rows)


def orders_table(result: dict[str, Any]) -> str:
    rows = [
        [f"{row['order']}, {row['tokens']:,} tokens in {row['steps']} steps", f"{row['milliseconds']:.1f} ms"]
        for row in result["orders"]
    ]
    return table(["one order", "made in"], rows)


def xl_table(xl: dict[str, Any]) -> str:
    names = ("steps of their own shapes", "compiled")
    rows = [[name, f"{1e3 * xl[name]['median_seconds']:.0f} ms"] for name in names]
    call = xl["call"]
    head = f"size XL, random weights, bfloat16, {call['num_inference_steps']} steps, {xl['machine']['device']}"
    return table([head, "one picture"], rows)


def training_figures(experiment: str) -> str:
    """Validation before and after, and time; the judge's score where videos were made; nothing before a measurement."""
    path = RESULTS / f"{experiment}-cpu.json"
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    (row,) = result["rows"]
    rows = []
    for name, course in row["arms"].items():
        losses = list(course["validation"].values())
        step = row.get("timed", {}).get(name, course["seconds_a_step"])
        rows.append([name, f"{losses[0]:.4f}", f"{losses[-1]:.4f}", f"{step:.1f} s"])
    if "PyTorch" in row.get("timed", {}):
        rows.append(["dense, PyTorch's own attention", "", "", f"{row['timed']['PyTorch']:.1f} s"])
    parts = [table([f"{row['steps']} steps, {row['frames']} frames", "loss before", "after", "a step"], rows)]
    if "prompts" in row:
        parts.append(prompts_table(row["prompts"]))
    return "\n\n".join([*parts, source(result, path, "../")])


def prompts_table(scores: dict[str, Any]) -> str:
    rows = [
        [
            name,
            *(f"{score[share]:.0%}" for share in ("digit_found", "colour_right", "direction_right")),
            "" if score["psnr_db"] is None else f"{score['psnr_db']:.1f} dB",
            f"{score['seconds']:.0f} s",
        ]
        for name, score in scores.items()
    ]
    videos = next(iter(scores.values()))["videos"]
    return table([f"{videos} held-out prompts", "digits found", "colours", "directions", "PSNR", "a video"], rows)


FIGURES: dict[str, Callable[[], str]] = {
    "miniature": miniature_figures,
    "quality": quality_figures,
    "plan": plan_figures,
    "attention": attention_figures,
    "model": model_figures,
    "gpu": gpu_figures,
    "sla": sla_figures,
    "methods": methods_figures,
    "tuned": partial(arms_figures, "tuned"),
    "duel": partial(arms_figures, "duel"),
    "seam": seam_figures,
    "planning": planning_figures,
    "decoding": decoding_figures,
    "length": partial(training_figures, "length"),
    "sparse": partial(training_figures, "sparse"),
}
MARKS = re.compile(r"(<!-- figures:(\w+)(?: (\w+))? -->\n).*?(<!-- /figures -->)", re.DOTALL)
"""A place for figures; a second word is what they are of."""


def filled(text: str) -> str:
    """The text with every marked stretch replaced by its figures."""

    def fill(found: re.Match[str]) -> str:
        start, name, of_what, end = found.groups()
        body = method_figures(of_what) if name == "method" else FIGURES[name]()
        return f"{start}{body}\n{end}"

    return MARKS.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the tables are out of date")
    check = parser.parse_args().check
    for page in PAGES:
        before = page.read_text()
        after = filled(before)
        if check and before != after:
            sys.exit(f"{page.relative_to(ROOT)} is out of date with benchmarks/results; run make figures")
        if not check:
            page.write_text(after)


if __name__ == "__main__":
    main()
