"""``falloff bench``: what it prints, what it writes, and what it refuses before it measures."""

import json
from pathlib import Path

import pytest
import torch

from falloff.cli import bench
from falloff.evaluation.bench.models import WAN, TrueModel
from falloff.evaluation.bench.shapes import on_grid
from falloff.geometry import Grid

TINY = ("--shape", "2,16,3x8x8", "--block", "16", "--rounds", "1")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 32,
        "rope_max_seq_len": 32,
    }
    model = TrueModel(shape=on_grid("tiny", 2, 12, Grid(4, 8, 8)), kind=WAN, config=config, text=4)
    monkeypatch.setattr(bench, "models", lambda: {"tiny": model})


def test_attention(falloff, here: Path) -> None:
    maps = ("--map", "radial", "--map", "random:0.4")
    arguments = (*TINY, *maps, "--kernel", "cpu", "--kernel", "cpu-tile", "--backward", "--output", "new/out.json")
    result = falloff("bench", "attention", *arguments)
    assert result.code == 0
    assert "2 heads x 16, 192 tokens (3x8x8), float32, forward and backward" in result.out
    assert "radial map, blocks of 16" in result.out
    assert "efficiency" in result.out
    assert "cpu-tile was not run" in result.out
    assert "step" in result.err
    values = json.loads((here / "new" / "out.json").read_text())
    assert values.keys() == {"command", "machine", "versions", "rows"}
    assert values["command"].startswith("falloff")
    assert values["machine"]["threads"] == str(torch.get_num_threads())
    assert [row["map"] for row in values["rows"]] == ["radial", "random:0.4"]
    assert [list(row["arms"]) for row in values["rows"]] == [["sdpa", "cpu"]] * 2
    assert all("cpu-tile" in row["refused"] for row in values["rows"])
    assert [path.name for path in here.iterdir()] == ["new"]


def test_model(falloff, here: Path, tiny_model: None) -> None:
    result = falloff("bench", "model", "--shape", "tiny", "--rounds", "1", "--kernel", "cpu", "--output", "out.json")
    assert result.code == 0
    assert "1 layers of attention over 256 tokens (4x8x8)" in result.out
    assert "of the operations" in result.out
    row = json.loads((here / "out.json").read_text())["rows"][0]
    assert row["arms"].keys() == {"dense", "radial, cpu"}
    assert row["by_operations"].keys() == {"share", "at_density", "without_attention"}


def test_a_machine_without_memory_is_told_in_one_line(
    falloff, here: Path, tiny_model: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falloff.evaluation.bench.memory.free_bytes", lambda device: 1000)
    for command, shape in (("attention", "hunyuan-720p"), ("model", "tiny")):
        result = falloff("bench", command, "--shape", shape, "--output", "out.json", "--device", "cpu")
        assert result.code == 1
        assert result.err.splitlines()[-1].startswith(f"falloff: {shape}")
        assert "choose a smaller shape" in result.err.splitlines()[-1]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["attention", "--shape", "wan9b"], ["'wan9b'", "miniature", "wan14b-720p", "HEADS,DIM"]),
        (["attention", "--map", "spiral"], ["'spiral'", "random:DENSITY"]),
        (["attention", "--map", "random:2"], ["2.0", "to 1"]),
        (["attention", "--shape", "2,32,100"], ["FRAMESxHEIGHTxWIDTH"]),
        (["attention", "--kernel", "magic"], ["'magic'", "reference"]),
        (["attention", "--dtype", "int8"], ["'int8'", "bfloat16"]),
        (["attention", "--rounds", "-1"], ["--rounds"]),
        (["attention", "--threads", "0"], ["--threads"]),
        (["attention", "--block", "0"], ["--block"]),
        (["attention", "--device", "tpu"], ["'tpu'", "cuda"]),
        (["attention", "--output", "."], ["is a folder"]),
        (["model", "--shape", "2,64,100"], ["'2,64,100'", "wan14b-720p"]),
        (["model", "--method", "fast"], ["'fast'", "radial"]),
        (["model", "--kernel", "magic"], ["'magic'", "reference"]),
        (["model", "--dtype", "int8"], ["'int8'", "bfloat16"]),
        (["model", "--rounds", "0"], ["--rounds"]),
        (["everything"], ["'everything'"]),
    ],
)
def test_wrong_usage(falloff, here: Path, arguments: list[str], words: list[str]) -> None:
    refused(falloff("bench", *arguments), 2, *words)


@pytest.mark.parametrize("command", ["attention", "model"])
def test_places_and_devices_that_are_not_there(
    falloff, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    refused(falloff("bench", command, "--device", "cuda"), 1, "--device cuda", "0 CUDA devices", "cpu")
    refused(falloff("bench", command, "--output", "/proc/nowhere/out.json"), 1, "/proc", "cannot write")


def refused(result, code: int, *words: str) -> None:
    assert result.code == code
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("falloff: ")
    for word in words:
        assert word in result.err
    assert list(Path.cwd().iterdir()) == []
