"""``falloff generate --class`` on a tiny random pipeline."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "decoding"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from decoders import model, tokenizer

    from falloff.decoding import LPDPipeline

    folder = tmp_path_factory.mktemp("decoder")
    LPDPipeline(model(torch.float32), tokenizer()).save_pretrained(folder)
    (folder / "generation.json").write_text('{"num_inference_steps": 6, "guidance_scale": 1.5, "order": "planned"}')
    return folder


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_generate_an_image_of_a_class(falloff, decoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "three.png"
    result = falloff("generate", "--class", 3, "--model", decoder, "--output", output)
    assert result.code == 0
    assert pixels(output).shape == (12, 20, 3)
    assert list(output.parent.iterdir()) == [output]
    assert "15 tokens in 6 steps" in result.out
    assert "20 x 12" in result.out
    assert "step 6 of 6" in result.err
    again = tmp_path / "again.png"
    other = tmp_path / "other.png"
    assert falloff("generate", "--class", 3, "--model", decoder, "--output", again).code == 0
    assert falloff("generate", "--class", 3, "--model", decoder, "--steps", 4, "--seed", 1, "--output", other).code == 0
    assert np.array_equal(pixels(output), pixels(again))
    assert not np.array_equal(pixels(output), pixels(other))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--class", 4], 1, "classes 0 to 3, got [4]"),
        (["--class", 1, "--steps", 99], 1, "15 tokens are decoded in 2 to 15 steps, got 99"),
        (["--class", -1], 2, "--class"),
        (["a fox", "--class", 1], 2, "PROMPT cannot be given with --class"),
        (["--class", 1, "--frames", 5, "--set", "block=2"], 2, "--set, --frames cannot be given with --class"),
        (["--class", 1, "--output", "out.mp4"], 2, "out.mp4 must end in .png"),
        (["a fox"], 2, "makes images of classes, not of prompts; give --class"),
    ],
)
def test_what_does_not_fit_is_one_line(
    falloff,
    decoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = falloff("generate", "--model", decoder, *arguments)
    assert result.code == code
    assert words in result.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_model_of_prompts_is_refused(
    falloff, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = falloff("generate", "--model", checkpoint, "--class", 1)
    assert result.code == 2
    assert "needs a model with LPDPipeline" in result.err
    assert "has WanPipeline; give a prompt instead" in result.err


def test_the_bundled_model_is_the_default(falloff, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert falloff("generate", "--class", 1).code == 0
    assert pixels(tmp_path / "out.png").shape[:2] == (64, 64)
