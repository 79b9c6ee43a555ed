"""A tiny checkpoint folder, and the command line called in this process."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str


@pytest.fixture
def falloff(capfd: pytest.CaptureFixture[str]):
    """Runs ``falloff ...``."""
    from falloff.cli import run

    def call(*arguments: object) -> Result:
        code = run([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from worded import SIZE, pipeline

    folder = tmp_path_factory.mktemp("checkpoint")
    pipeline().save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({**SIZE, "fps": 8}))
    return folder
