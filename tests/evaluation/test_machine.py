"""What others took of the processors: busy time that is not this process's own, the host's other guests included."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from falloff.evaluation import machine

TICKS = 100.0
"""A second, as systems count."""


def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: float, line: str) -> float | None:
    """Read when the kernel's counters went from nought to a line's, and this process's time by ``own`` seconds."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 7 7 7 7\n")
    clock = [0.0]
    monkeypatch.setattr(machine, "Path", lambda _: stat)
    monkeypatch.setattr(machine.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(machine.os, "sysconf", lambda _: TICKS)
    others = machine.Others()
    stat.write_text(f"cpu  {line}\ncpu0 7 7 7 7\n")
    clock[0] = own
    return others.read()


@pytest.mark.parametrize(
    ("own", "line", "share"),
    [
        # user nice system idle waiting interrupts soft steal guest guest_nice, of 1000 ticks in all
        (4.0, "400 0 0 550 50 0 0 0 0 0", 0.0),
        (3.0, "300 50 20 500 50 10 20 50 30 9", 0.15),
        (9.0, "300 0 0 700 0 0 0 0 0 0", 0.0),
    ],
)
def test_what_is_busy_and_not_our_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: float, line: str, share: float
) -> None:
    assert counted(monkeypatch, tmp_path, own, line) == pytest.approx(share)


def test_no_time_has_passed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert counted(monkeypatch, tmp_path, 0.0, "0 0 0 0 0 0 0 0 0 0") is None


def test_systems_that_do_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path / "none")
    assert machine.Others().read() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the system does not tell")
def test_another_program_is_seen() -> None:
    others = machine.Others()
    spinning: Any = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        taken = others.read()
    finally:
        spinning.kill()
        spinning.wait()
    assert taken is not None
    assert taken > 0.3 / machine._cores()
