"""The page of supported models: what it tells is what hosts say and what tests passed."""

from __future__ import annotations

import dataclasses
import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from families import FAMILIES

from falloff import hosts

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "models.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.fixture(scope="module")
def result(script: dict[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads(script["RESULT"].read_text())
    return kept


def test_page_is_up_to_date(script: dict[str, Any], result: dict[str, Any]) -> None:
    assert script["PAGE"].read_text() == script["page"](result), "run make models"


def test_page_has_every_family_class_and_refusal(script: dict[str, Any], result: dict[str, Any]) -> None:
    page = script["page"](result)
    for host in hosts.hosts():
        for model in (*host.models, *host.refused):
            assert f"`{model}`" in page
        for reason in host.refused.values():
            assert reason in page
    assert "`causal_block_size` above 1" in page


def test_page_follows_the_hosts(
    script: dict[str, Any], result: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = script["page"](result)
    changed = dataclasses.replace(hosts.host_for(type("MochiTransformer3DModel", (), {})()), family="Mocha")
    monkeypatch.setattr(hosts, "_registered", {"Mocha": changed})
    after = script["page"](result)
    assert after != before
    assert "| Mocha |" in after


def test_kept_result_has_every_family_and_what_failed_is_told(script: dict[str, Any], result: dict[str, Any]) -> None:
    families = result["families"]
    assert {name: family.model for name, family in FAMILIES.items()} == {
        name: family["model"] for name, family in families.items()
    }
    assert set(families["Wan"]["columns"].values()) == {"yes"}
    assert families["Wan"]["columns"].keys() == script["COLUMNS"].keys()
    failed = {**result, "families": {"Wan": {"model": "x", "columns": {"LoRA": "no"}}}}
    assert "| Wan | - | - | - | - | no |" in script["tested"](failed)


def test_outcomes_of_tests_become_columns(script: dict[str, Any]) -> None:
    """A column holds when each of its tests passed; those that are no column's are not run."""
    tried = script["Tried"]()

    class Item:
        def __init__(self, test: str, file: str, **given: str) -> None:
            self.originalname, self.path, self.nodeid = test, Path(file), f"{file}::{test}{given}"
            self.callspec = type("CallSpec", (), {"params": given})

    class Config:
        hook = type("Hook", (), {"pytest_deselected": lambda items: None})

    class Report:
        def __init__(self, item: Item, outcome: str, when: str = "call") -> None:
            self.nodeid, self.when, self.outcome, self.failed = item.nodeid, when, outcome, outcome == "failed"

    good, bad = Item("test_lora", "a.py", family="Wan"), Item("test_taylorseer", "a.py", name="Wan")
    also, fine = (
        Item("test_magcache", "a.py", name="Wan"),
        Item("test_sparse_calls_know_step_branch_and_layer", "test_wan.py"),
    )
    broken = Item("test_lora", "a.py", family="Mochi")
    part, rest = Item("test_magcache", "a.py", name="Mochi"), Item("test_taylorseer", "a.py", name="Mochi")
    never = Item("test_group_offload", "a.py", family="Mochi")
    items = [good, Item("test_other", "a.py"), bad, also, fine, broken, part, rest, never]
    tried.pytest_collection_modifyitems(Config, items)
    assert items == [good, bad, also, fine, broken, part, rest, never]
    for item in items:
        tried.pytest_runtest_logreport(Report(item, "passed", when="setup"))
    for item in (good, also, fine, part):
        tried.pytest_runtest_logreport(Report(item, "passed"))
    tried.pytest_runtest_logreport(Report(bad, "failed"))
    for item in (rest, never):
        tried.pytest_runtest_logreport(Report(item, "skipped"))
    tried.pytest_runtest_logreport(Report(broken, "failed", when="setup"))
    found = tried.result()["families"]
    assert found["Wan"]["columns"] == {"LoRA": "yes", "step caches": "no", "pipeline": "yes"}
    assert found["Mochi"]["columns"] == {"LoRA": "no", "step caches": "in part", "offload": "-"}


def test_check_tells_when_the_page_is_old(script: dict[str, Any], tmp_path: Path) -> None:
    """As ``make lint`` runs it, on a copy of the project whose page is another one."""
    for part in ("benchmarks/results", "docs"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "benchmarks" / "models.py").write_text(SCRIPT.read_text())
    (tmp_path / "benchmarks" / "results" / "models.json").write_text(script["RESULT"].read_text())
    (tmp_path / "docs" / "models.md").write_text("old")
    command = [sys.executable, str(tmp_path / "benchmarks" / "models.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "docs/models.md is out of date with the hosts or models.json; run make models" in done.stderr
