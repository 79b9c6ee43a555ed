"""Tables of speed: of kernels, of whole models, and of what falloff itself takes."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pages import RESULTS, source, table


def plan_figures() -> str:
    path = RESULTS / "plan-cpu.json"
    result = json.loads(path.read_text())
    rows = [
        [row["size"], row["grid"], f"{row['tokens']:,}", f"{row['density']:.1%}", f"{row['milliseconds']:.0f} ms"]
        for row in result["rows"]
        if row["method"] == "radial"
    ]
    return table(["size", "grid", "tokens", "density", "plan"], rows) + "\n\n" + source(result, path)


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


def model_figures() -> str:
    path = RESULTS / "model-cpu.json"
    result = json.loads(path.read_text())
    return model_table(result) + "\n\n" + source(result, path)


def model_table(result: dict[str, Any]) -> str:
    """A step of whole transformers: the fastest dense one and the sparse ones."""
    rows = []
    for row in result["rows"]:
        start = f"{row['shape']}, {row['parameters'] / 1e6:,.0f} million parameters, {row['tokens']:,} tokens"
        for name, arm in row["arms"].items():
            if arm["kind"] == "sparse" or name == row["best_dense"]:
                possible = f"{row['by_time']['at_density']:.2f}x" if arm["kind"] == "sparse" else "-"
                rows.append([start, name, f"{arm['ms'] / 1e3:.2f} s", f"{arm['speedup']:.2f}x", possible])
    return table(["transformer", "attention", "a step", "speed-up", "allowed"], rows)


def gpu_figures() -> str:
    """What was measured on GPUs, or that nothing was."""
    parts = []
    for path, result in results("attention"):
        rows = []
        for row in result["rows"]:
            start = f"{row['shape']}, {row['map']}, {row['dtype']}{', with backward' if row['backward'] else ''}"
            for name, arm in row["arms"].items():
                if arm["kind"] == "sparse" or name == row["best_dense"]:
                    efficiency = "-" if arm["efficiency"] is None else f"{arm['efficiency']:.2f}"
                    speed = [f"{arm['ms']:.1f} ms", f"{arm['tflops']:.0f}", f"{arm['speedup']:.2f}x", efficiency]
                    rows.append([start, f"{row['density']:.1%}", name, *speed])
        head = ["attention", "density", "kernel", "time", "TFLOP/s", "speed-up", "efficiency"]
        parts += [table(head, rows), source(result, path)]
    for path, result in results("model"):
        parts += [model_table(result), source(result, path)]
    return "\n\n".join(parts) or "Nothing has been measured on a GPU yet."


def results(name: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Those of GPUs."""
    for path in sorted(RESULTS.glob(f"{name}-*.json")):
        result = json.loads(path.read_text())
        if result["machine"]["device"] != "cpu":
            yield path, result


def sla_figures() -> str:
    """One call of SLA by the keys of its linear part, and what its blocks alone would take."""
    parts = [sla_table(path) for path in sorted(RESULTS.glob("sla-*.json"))]
    return "\n\n".join(parts)


def sla_table(path: Path) -> str:
    result = json.loads(path.read_text())
    tables = []
    for row in result["rows"]:
        arms = row["arms"]
        dense = (name for name, way in arms.items() if way["kind"] == "dense")
        fastest = min(dense, key=lambda name: arms[name]["forward_ms"] + arms[name]["backward_ms"])
        names = [fastest, "blocks alone", *(name for name in arms if name.startswith("SLA"))]
        lines = [[name, *both(arms[name], "forward"), *both(arms[name], "backward")] for name in names]
        head = f"{row['heads']} heads x {row['head_dim']}, {row['tokens']:,} tokens, {row['dtype']}"
        tables.append(table([head, "forward", "against dense", "backward", "against dense"], lines))
    return "\n\n".join([*tables, source(result, path, "../../")])


def both(way: dict[str, float], pass_: str) -> list[str]:
    return [f"{way[f'{pass_}_ms']:.0f} ms", f"{way[f'{pass_}_speedup']:.2f}x"]


def seam_figures() -> str:
    path = RESULTS / "seam-cpu.json"
    result = json.loads(path.read_text())
    rows = [
        [
            f"{row['grid']} tokens, a step" if "grid" in row else "one layer's attention to one token",
            name,
            f"{row['native_ms']:.1f} ms" if "grid" in row else f"{row['native_us']:.0f} us",
            f"{cost['share_of_step']:.2%}",
            f"{cost['us_a_call']:.0f} us",
        ]
        for row in result["rows"]
        for name, cost in row["attached"].items()
    ]
    head = ["miniature", "attached", "without", "more, of it", "more a call"]
    return table(head, rows) + "\n\n" + source(result, path)


def planning_figures() -> str:
    """Memory of a method's first call and of its second, by shape."""
    parts = []
    for path in sorted(RESULTS.glob("planning-*.json")):
        result = json.loads(path.read_text())
        first = result["rows"][0]
        calls: dict[str, list[str]] = defaultdict(list)
        for row in result["rows"]:
            calls[row["method"]] = calls[row["method"]] or [f"{row['density']:.0%}"]
            calls[row["method"]].append(f"{row['extra_bytes'] / 1e6:.0f} MB")
        size = f"{first['tokens']:,} tokens, {first['heads']} heads of {first['head_dim']}"
        head = [size, "density", "first call", "next"]
        parts += [table(head, [[name, *both] for name, both in calls.items()]), source(result, path, "../../")]
    return "\n\n".join(parts)
