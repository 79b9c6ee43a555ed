"""Bad input: one line that names what was given, an exit code, nothing written, nothing loaded."""

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of these are found before weights are read."""

    def load(_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("falloff.cli.pipeline.load", load)
    monkeypatch.chdir(tmp_path)


def check(result, code: int, *words: str) -> None:
    assert result.code == code
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert result.err.startswith("falloff: ")
    assert "Traceback" not in result.err
    for word in words:
        assert word in result.err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate"], ["Missing argument", "--help"]),
        (["generate", " "], ["prompt is empty"]),
        (["generate", "fox", "--method", "radail"], ["'radail'", "dense", "radial"]),
        (["generate", "fox", "--set", "decay=2"], ["decay = 2.0", "0.0 to 1.0", "falloff methods radial"]),
        (["generate", "fox", "--set", "decay=much"], ["'much'", "a number"]),
        (["generate", "fox", "--set", "window=round"], ["'round'", "band or disc"]),
        (["generate", "fox", "--set", "speed=9"], ["'speed'", "decay", "dense_first"]),
        (["generate", "fox", "--set", "decay"], ["NAME=VALUE"]),
        (["generate", "fox", "--set", "dense_layers=a"], ["'a'", "whole numbers"]),
        (["generate", "fox", "--set", "dense_first=-1"], ["dense_first = -1", "negative"]),
        (["generate", "fox", "--kernel", "magic"], ["'magic'", "auto", "reference"]),
        (["generate", "fox", "--frames", "0"], ["--frames"]),
        (["generate", "fox", "--output", "out.gif"], ["out.gif", ".mp4"]),
        (["generate", "fox", "--colour", "red"], ["--colour"]),
        (["generate", "fox", "--model", "./nowhere"], ["no folder ./nowhere"]),
        (["compare", "--prompt", ""], ["prompt is empty"]),
        (["compare", "--model", "./nowhere"], ["--prompt"]),
        (["compare", "--seeds", "one"], ["'one'", "whole numbers"]),
        (["compare", "--methods", "radial,,"], ["commas"]),
        (["compare", "--methods", "radial,fast"], ["'fast'", "dense", "radial"]),
        (["compare", "--methods", "radial(decay=2)"], ["decay = 2.0", "0.0 to 1.0"]),
        (["compare", "--methods", "radial(decay=0.5"], ["radial(decay=0.5", "must end in ')'"]),
        (["compare", "--methods", "radial(speed=9)"], ["'speed'", "decay", "dense_first"]),
        (["compare", "--methods", "radial()"], ["NAME=VALUE"]),
        (["compare", "--methods", "none.yaml"], ["cannot read the recipe", "none.yaml"]),
        (["generate", "fox", "--method", "none.yaml"], ["cannot read the recipe", "none.yaml"]),
        (["methods", "fast"], ["'fast'", "dense", "radial"]),
        (["paint"], ["'paint'"]),
    ],
)
def test_wrong_usage(falloff, arguments: list[str], words: list[str]) -> None:
    check(falloff(*arguments), 2, *words)


def test_output_folder_not_writable(falloff) -> None:
    check(falloff("generate", "fox", "--output", "/proc/nowhere/out.mp4"), 1, "/proc", "cannot write")
    check(falloff("compare", "--output", "/dev/null/here"), 1, "/dev/null", "not a folder")


def test_frames_that_the_autoencoder_cannot_make(falloff, checkpoint: Path) -> None:
    check(falloff("generate", "fox", "--model", checkpoint, "--frames", 16), 2, "--frames 16", "13 and 17")


def test_files_that_cannot_hold_a_video(falloff, checkpoint: Path) -> None:
    check(falloff("generate", "fox", "--output", "fox.gif"), 2, "fox.gif", ".mp4 or .png")
    video = falloff("generate", "fox", "--model", checkpoint, "--output", "fox.png")
    assert video.code == 2
    assert video.err.splitlines()[1:] == ["falloff: WanPipeline makes videos; --output fox.png must end in .mp4"]


@pytest.mark.parametrize(("side", "nearest"), [("height", "96 and 112"), ("width", "96 and 112")])
def test_sizes_that_the_model_cannot_make(falloff, checkpoint: Path, side: str, nearest: str) -> None:
    check(falloff("generate", "fox", "--model", checkpoint, f"--{side}", 100), 2, f"--{side} 100", "16", nearest)


def test_model_is_a_file(falloff, checkpoint: Path) -> None:
    check(falloff("generate", "fox", "--model", checkpoint / "model_index.json"), 2, "is a file")


@pytest.fixture
def copy(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path_factory.mktemp("copy") / "model"))


@pytest.mark.parametrize(
    ("missing", "words"),
    [
        ("model_index.json", ["no pipeline folder", "model_index.json"]),
        ("transformer/diffusion_pytorch_model.safetensors", ["transformer", "no weights", "incomplete"]),
        ("vae", ["vae is missing", "incomplete"]),
        ("scheduler/scheduler_config.json", ["scheduler", "no configuration"]),
    ],
)
def test_incomplete_checkpoints(falloff, copy: Path, missing: str, words: list[str]) -> None:
    target = copy / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    check(falloff("generate", "fox", "--model", copy), 1, *words)


def test_missing_shard(falloff, copy: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (copy / "vae" / "model.safetensors.index.json").write_text(json.dumps(index))
    check(falloff("generate", "fox", "--model", copy), 1, "part-1.safetensors is missing")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("SanaVideoTransformer3DModel", ["cannot be served", "linear"]),
        ("UNet9000", ["UNet9000", "WanTransformer3DModel"]),
    ],
)
def test_models_of_no_supported_family(falloff, copy: Path, kind: str, words: list[str]) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"][1] = kind
    (copy / "model_index.json").write_text(json.dumps(index))
    check(falloff("compare", "--prompt", "fox", "--model", copy), 1, *words)


def test_broken_index(falloff, copy: Path) -> None:
    (copy / "model_index.json").write_text("{")
    check(falloff("generate", "fox", "--model", copy), 1, "cannot read", "model_index.json")
