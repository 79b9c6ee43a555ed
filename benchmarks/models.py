"""Write docs/models.md, the table of supported models, from the hosts and from the tests that passed.

python benchmarks/models.py             write the page
python benchmarks/models.py --check     only tell whether it is up to date
python benchmarks/models.py --test      run the tests of the families first, and keep what passed
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from falloff.hosts import Host, hosts

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "models.md"
RESULT = ROOT / "benchmarks" / "results" / "models.json"

COLUMNS = {
    "dense is bit-equal": ("test_whole_map_and_dense_are_bit_equal_and_leave_nothing",),
    "sparse is masked attention": ("test_sparse_is_masked_attention_and_pins_text",),
    "pipeline": ("test_run_is_followed", "test_sparse_calls_know_step_branch_and_layer"),
    "compiled": ("test_compiled_layers_equal_eager_in_one_frame",),
    "LoRA": ("test_lora", "test_lora_swapped_and_fused_while_enabled"),
    "offload": ("test_group_offload",),
    "step caches": (
        "test_first_block_cache",
        "test_pyramid_attention_broadcast",
        "test_taylorseer",
        "test_magcache",
    ),
    "training": ("test_gradient_checkpointing",),
}
"""A column of the table, and the tests that must pass for it."""
FILES = ("test_families.py", "test_composition.py", "test_pipelines.py", "test_wan.py")
OF_ONE_FAMILY = {"test_wan.py": "Wan"}
"""Files whose tests name no family, because all of them are about this one."""
INTRO = """\
# Models that falloff knows

`falloff.enable` finds the family of a transformer by its class. Written by `make models` from the descriptions in
`src/falloff/hosts` and from the tests that passed; do not edit it by hand. A model that is not here is described in
about twenty lines: see [new-family.md](new-family.md).
"""
BACKEND = """\
## In programs that know attention by the name of a backend

Serving programs choose attention by `model.set_attention_backend(name)`, which takes falloff's marks away; the next
forward then says so. After `falloff.register_diffusers_backend()` diffusers takes "falloff" as a name: a model that
`falloff.enable` has been called on stays as it is, and one it has not been called on stays dense on the native backend.
"""


@dataclass
class Tried:
    """A plugin of pytest: runs the tests of ``COLUMNS`` alone, and keeps which families passed them."""

    outcomes: dict[str, dict[str, list[str]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    """By family and column: passed, failed or skipped."""
    places: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Family and column of every test."""

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        column_of = {test: column for column, tests in COLUMNS.items() for test in tests}
        others = [item for item in items if item.originalname not in column_of]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item.originalname in column_of]
        for item in items:
            given = item.callspec.params
            family = OF_ONE_FAMILY.get(item.path.name) or given.get("name") or given["family"]
            self.places[item.nodeid] = family, column_of[item.originalname]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.failed:
            family, column = self.places[report.nodeid]
            self.outcomes[family][column].append(report.outcome)

    def result(self) -> dict[str, Any]:
        from families import FAMILIES

        return {
            "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
            "families": {
                name: {
                    "model": FAMILIES[name].model,
                    "columns": {column: summed(outcomes) for column, outcomes in self.outcomes[name].items()},
                }
                for name in FAMILIES
                if name in self.outcomes
            },
        }


def summed(outcomes: list[str]) -> str:
    """A test skips what diffusers cannot do with a model even without us."""
    if "failed" in outcomes:
        return "no"
    if "passed" not in outcomes:
        return "-"
    return "in part" if "skipped" in outcomes else "yes"


def test() -> None:
    """Run the tests and keep what passed; fails when a test did."""
    import pytest

    tried = Tried()
    code = pytest.main(["-p", "no:cacheprovider", *(str(ROOT / "tests" / "hosts" / name) for name in FILES)], [tried])
    if code != pytest.ExitCode.OK:
        sys.exit(f"the tests of the families did not pass ({code}); {RESULT.name} is as it was")
    RESULT.write_text(json.dumps(tried.result(), indent=2) + "\n")


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rows])


def described() -> str:
    """Families, their classes and what they are, from the hosts."""
    rows = [
        [
            host.family,
            "<br>".join(f"`{model}`" for model in host.models),
            "video" if host.frames else "images",
            f"{host.text_side} the {'video' if host.frames else 'image'}" if host.text_side else "by cross-attention",
            " ".join(f"`{pattern}`" for pattern in host.self_attention),
        ]
        for host in hosts()
        if host.models
    ]
    return table(["family", "transformers", "makes", "text", "self-attention"], rows)


def refused() -> str:
    """What is not served, and why, from the hosts."""
    classes = [[f"`{model}`", host.family, why] for host in hosts() for model, why in host.refused.items()]
    settings = [["some of them", host.family, _words(host)] for host in hosts() if host.refuse.__doc__]
    return table(["model", "family", "refused"], [*classes, *settings])


def _words(host: Host) -> str:
    """What a host that looks at a model's settings refuses: the docstring of what looks, as code is marked here."""
    words = " ".join(str(host.refuse.__doc__).split()).replace("``", "`").rstrip(".")
    return words[0].lower() + words[1:]


def tested(result: dict[str, Any]) -> str:
    """What passed, from the kept result; a dash where no test of that family is."""
    rows = [
        [name, *(family["columns"].get(column, "-") for column in COLUMNS)]
        for name, family in result["families"].items()
    ]
    return table(["model", *COLUMNS], rows)


def page(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    meaning = (
        f"With {versions}, on tiny models of each family with random weights, on the CPU. `yes`: every test of a "
        "kind passed. `in part`: all passed but those of what diffusers itself cannot do with this model, as "
        "FirstBlockCache and MagCache where it knows no such blocks. A dash: diffusers cannot do it at all, or it was "
        "tried on other models of the family alone."
    )
    parts = [
        INTRO.strip(),
        described(),
        "## What was tested",
        meaning,
        tested(result),
        "## What is refused",
        "With its reason: models before anything is attached, settings of a run when it starts. Methods that plan "
        "between frames refuse models of images too.",
        refused(),
        BACKEND.strip(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when the page is out of date")
    parser.add_argument("--test", action="store_true", help="run the tests of the families first")
    given = parser.parse_args()
    if given.test:
        test()
    text = page(json.loads(RESULT.read_text()))
    if not given.check:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date with the hosts or {RESULT.name}; run make models")


if __name__ == "__main__":
    main()
