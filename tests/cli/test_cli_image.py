"""``--image``: what an image-to-video pipeline begins with, on a tiny checkpoint."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "training"))

SPARSE = ("--set", "block=2", "--set", "dense_first=1", "--set", "sink_frames=0")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from worded import SIZE
    from worded_pipes import image_to_video

    folder = tmp_path_factory.mktemp("model")
    image_to_video("2.1").save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({**SIZE, "fps": 8}))
    return folder


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Twice as wide as it is tall: white, with a green bar at either end that no square of its middle shows."""
    pixels = np.full((48, 96, 3), 255, np.uint8)
    pixels[:, :20] = pixels[:, -20:] = (0, 255, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Image.Image]:
    """The pictures that pipeline calls are given."""
    from diffusers import WanImageToVideoPipeline

    seen: list[Image.Image] = []
    whole = WanImageToVideoPipeline.check_inputs

    def look(self, prompt, negative_prompt, image, *rest, **more):
        seen.append(image)
        return whole(self, prompt, negative_prompt, image, *rest, **more)

    monkeypatch.setattr(WanImageToVideoPipeline, "check_inputs", look)
    return seen


def test_generate_begins_with_the_middle_of_the_picture(
    falloff, model: Path, wide: Path, tmp_path: Path, calls: list[Image.Image]
) -> None:
    from falloff.evaluation.video import read

    output = tmp_path / "fox.mp4"
    done = falloff("generate", "a fox", "--model", model, "--image", wide, *SPARSE, "--output", output)
    assert done.code == 0, done.err
    assert read(output).shape == (5, 32, 32, 3)
    (picture,) = calls
    assert picture.size == (32, 32)
    assert np.asarray(picture).min() == 255


def test_a_picture_is_upright_and_in_colour(tmp_path: Path) -> None:
    from falloff.cli.pictures import opened

    lying = Image.new("L", (30, 10))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif)
    picture = opened(tmp_path / "lying.jpg")
    assert picture is not None
    assert (picture.size, picture.mode) == ((10, 30), "RGB")


def test_compare_records_the_picture(falloff, model: Path, wide: Path, tmp_path: Path, calls: list[object]) -> None:
    arguments = ("--prompt", "a fox", "--model", model, "--image", wide, *SPARSE, "--output", tmp_path / "out")
    done = falloff("compare", *arguments)
    assert done.code == 0, done.err
    assert len(calls) == 5  # dense, radial and dense again; two of them in short first
    values = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert values["call_arguments"]["image"].startswith("picture of 32 x 32, SHA-256 ")
    assert "0x" not in values["call_arguments"]["image"]


def test_tune_goes_on_with_the_same_picture_alone(
    falloff, model: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from falloff import Recipe
    from falloff.evaluation import tune as tuning

    # one round of the search, whatever the time
    monkeypatch.setattr(tuning, "_run", lambda search, study, deadline: tuning._round(search, study))
    monkeypatch.setattr(tuning._Search, "refine", lambda search, plain, deadline: ([], {}))
    common = ("tune", "--recall", 0.01, "--prompt", "a fox", "--model", model, "--output", tmp_path / "recipe.yaml")
    same, other = tmp_path / "same.png", tmp_path / "other.png"
    same.write_bytes(wide.read_bytes())
    Image.new("RGB", (32, 32), "red").save(other)
    for file in (wide, same):
        done = falloff(*common, "--image", file)
        assert done.code == 0, done.err
    evidence = Recipe.load(tmp_path / "recipe.yaml").evidence
    assert evidence["call_arguments"]["image"].startswith("picture of 32 x 32, SHA-256 ")
    assert evidence["candidates"] == 2 * tuning.AT_ONCE
    done = falloff(*common, "--image", other)
    assert done.code == 1
    assert "trials of another search (other call)" in done.err


def test_a_comparison_goes_on_with_the_same_picture(model: Path, tmp_path: Path, calls: list[object]) -> None:
    from diffusers import WanImageToVideoPipeline
    from worded import SIZE

    import falloff as library

    pipe = WanImageToVideoPipeline.from_pretrained(model)
    for colour in ("white", "white", "black"):
        image = Image.new("RGB", (32, 32), colour)
        library.compare(pipe, "a fox", "dense", kept=tmp_path / "kept", image=image, **SIZE)
    assert len(calls) == 2 * (2 + 3)  # two short runs and three whole ones of each picture


def test_a_picture_is_known_by_its_pixels() -> None:
    from falloff.evaluation.generate import recorded

    white, again, black = (
        recorded({"image": Image.new("RGB", (4, 4), colour)}) for colour in ("white",) * 2 + ("black",)
    )
    assert white == again != black
    assert recorded({"height": 32}) == {"height": 32}


@pytest.mark.parametrize("command", ["generate", "compare", "tune"])
def test_what_cannot_be_begun_with_is_told_before_weights_are_loaded(
    falloff, model: Path, checkpoint: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    def load(_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("falloff.cli.pipeline.load", load)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.png").write_text("a fox")
    first = {"generate": ("a fox",), "compare": ("--prompt", "a fox"), "tune": ("--prompt", "a fox", "--psnr", 30)}
    for folder, given, told in (
        (model, ("--image", "none.png"), "there is no file none.png"),
        (model, ("--image", "words.png"), "--image words.png is no picture that can be read"),
        (checkpoint, ("--image", wide), "WanPipeline takes no picture; leave --image out"),
        (model, (), "WanImageToVideoPipeline begins with a picture; give --image"),
    ):
        done = falloff(command, *first[command], "--model", folder, *given)
        assert done.code == 2
        assert told in done.err.splitlines()[-1]
    assert {path.name for path in tmp_path.iterdir()} == {"wide.png", "words.png"}


def test_a_pipeline_known_only_once_loaded_is_checked_too(wide: Path) -> None:
    from worded_pipes import image_to_video

    from falloff.cli.errors import CommandError
    from falloff.cli.pictures import added, opened

    with pytest.raises(CommandError, match="LTXImageToVideoPipeline begins with a picture"):
        added(image_to_video("LTX"), {}, None)
    cogvideox = image_to_video("CogVideoX")
    assert added(cogvideox, {}, opened(wide))["image"].size == (32, 32)
    assert added(cogvideox, {"width": 64}, opened(wide))["image"].size == (64, 32)


def test_a_pipeline_that_goes_by_the_picture_is_given_the_whole(wide: Path) -> None:
    from falloff.cli.pictures import added, opened

    class Sized:
        def __call__(self, prompt: str, image: Image.Image) -> None: ...

    assert added(Sized(), {}, opened(wide))["image"].size == (96, 48)


def test_classes_take_no_picture(falloff, wide: Path) -> None:
    for command in ("generate", "compare"):
        done = falloff(command, "--class", 3, "--image", wide)
        assert done.code == 2
        assert "--image cannot be given" in done.err
