"""``falloff compare`` of a tiny random pipeline that decodes images."""

import json
from pathlib import Path

import pytest
from test_cli_class import decoder  # noqa: F401 - a fixture


def test_compare_writes_a_page(falloff, decoder: Path, tmp_path: Path) -> None:  # noqa: F811 - the fixture
    output = tmp_path / "new"
    result = falloff("compare", "--model", decoder, "--class", 3, "--class", 1, "--steps", 5, "--output", output)
    assert result.code == 0
    assert "planned" in result.out
    assert "picture 16 of 16" in result.err
    values = json.loads((output / "compare.json").read_text())
    assert [asked["label"] for asked in values["asked"]] == [3, 1]
    assert values["call_arguments"] == {"num_inference_steps": 5, "guidance_scale": 1.5}
    assert (output / "class-1-seed-0-planned-order.png").exists()
    assert str(output / "compare.html") in result.out


def test_bundled_pictures_are_judged_and_all_classes_drawn(
    falloff,
    decoder: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Judge:
        def score(self, images, labels):  # type: ignore[no-untyped-def]  # as the real one
            return {"accuracy": 0.5, "frechet": None}

    monkeypatch.setattr("falloff.miniature.images.path", lambda: decoder)
    monkeypatch.setattr("falloff.miniature.images.measure.Judge", Judge)
    assert falloff("compare", "--class", 2, "--output", tmp_path / "one").code == 0
    values = json.loads((tmp_path / "one" / "compare.json").read_text())
    assert values["parallel"][0]["scores"] == {"pictures": 1, "accuracy": 0.5, "frechet": None}
    assert falloff("compare", "--model", decoder, "--output", tmp_path / "all").code == 0
    values = json.loads((tmp_path / "all" / "compare.json").read_text())
    assert [asked["label"] for asked in values["asked"]] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--class", 4], 1, "classes 0 to 3, got [4]"),
        (["--steps", 99], 1, "15 tokens are decoded in 2 to 15 steps, got 99"),
        (["--prompt", "a fox"], 2, "--prompt cannot be given where images are decoded"),
        (["--methods", "sta", "--set", "block=2"], 2, "--set, --methods cannot be given where images are decoded"),
        (["--seeds", "x"], 2, "whole numbers"),
    ],
)
def test_what_does_not_fit_is_one_line(
    falloff,
    decoder: Path,  # noqa: F811 - the fixture
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[object],
    code: int,
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    result = falloff("compare", "--model", decoder, *arguments)
    assert result.code == code
    assert words in result.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
