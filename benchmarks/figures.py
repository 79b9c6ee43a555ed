"""Write the README's tables from the committed results; ``--check`` only tells whether they are up to date.

python benchmarks/figures.py
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(result: dict[str, Any], path: Path) -> str:
    machine = result["machine"]
    link = path.relative_to(ROOT)
    return (
        f"[{path.name}]({link}): {machine['processor']}, {machine['threads']} threads, "
        f"{machine['vector instructions']}, torch {result['versions']['torch']}."
    )


def plan_figures() -> str:
    path = RESULTS / "plan-cpu.json"
    result = json.loads(path.read_text())
    rows = [
        [row["size"], row["grid"], f"{row['tokens']:,}", f"{row['density']:.1%}", f"{row['milliseconds']:.0f} ms"]
        for row in result["rows"]
        if row["method"] == "radial"
    ]
    return table(["size", "grid", "tokens", "density", "plan"], rows) + "\n\n" + source(result, path)


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
                    f"{arm['speedup']:.2f}x",
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


def attention_figures() -> str:
    path = RESULTS / "attention-cpu.json"
    result = json.loads(path.read_text())
    rows = []
    for row in result["rows"]:
        shape = f"{row['heads']} heads x {row['head_dim']}, {row['tokens']:,} tokens, blocks of {row['block']}"
        kind = "Radial map" if row["map"] == "radial" else "random maps"
        start = [f"{shape}, {kind}, {row['dtype']}", f"{row['density']:.1%}"]
        for name, arm in row["arms"].items():
            if arm["kind"] == "sparse":
                rows.append([*start, name, f"{arm['speedup']:.2f}x", f"{arm['efficiency']:.2f}"])
    refused = {(name, reason) for row in result["rows"] for name, reason in row["refused"].items()}
    reasons = ["Not measured: " + "; ".join(f"{name} ({reason})" for name, reason in sorted(refused)) + "."]
    head = ["attention", "density", "kernel", "speed-up", "efficiency"]
    return "\n\n".join([table(head, rows), *(reasons if refused else []), source(result, path)])


FIGURES: dict[str, Callable[[], str]] = {
    "miniature": miniature_figures,
    "quality": quality_figures,
    "plan": plan_figures,
    "attention": attention_figures,
}


def filled(text: str) -> str:
    """The text with every marked stretch replaced by its figures."""
    for name, figures in FIGURES.items():
        marks = re.compile(rf"(<!-- figures:{name} -->\n).*?(<!-- /figures -->)", re.DOTALL)
        if not marks.search(text):
            raise SystemExit(f"{README.name} has no place marked for the figures {name!r}")
        body = figures()
        text = marks.sub(lambda found, body=body: f"{found[1]}{body}\n{found[2]}", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the tables are out of date")
    check = parser.parse_args().check
    before = README.read_text()
    after = filled(before)
    if check and before != after:
        sys.exit(f"{README.name} is out of date with benchmarks/results; run make figures")
    if not check:
        README.write_text(after)


if __name__ == "__main__":
    main()
