"""Folders of videos with captions: found in every form, and refused with all that is wrong with them."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_clips import write_clip

from falloff.training import TrainingError
from falloff.training.data import Clip, find, read_frames, usable

ORIENTATION = 0x0112
"""What EXIF calls the turn that a picture is to be shown with."""


def shard(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as out:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("video") / "one.mp4"
    write_clip(file, frames=9)
    return file


def test_captions_beside_videos(clips: Path) -> None:
    found = usable(clips, 9)
    assert [(clip.name, clip.caption) for clip in found][:2] == [("0.mp4", "a"), ("1.mp4", "a fox")]
    assert len(found) == 5


def test_an_output_in_the_folder_is_no_data(tmp_path: Path, video: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(video.read_bytes())
    (tmp_path / "a.txt").write_text("a fox")
    (tmp_path / "out" / "samples").mkdir(parents=True)
    (tmp_path / "out" / "samples" / "step-000000-0.mp4").write_bytes(video.read_bytes())
    assert [clip.name for clip in usable(tmp_path, 9)] == ["a.mp4"]


def test_a_list_of_files_and_captions(tmp_path: Path, video: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.mp4").write_bytes(video.read_bytes())
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "deep/b.mp4", "caption": " a fox "}) + "\n\n")
    assert usable(tmp_path, 9) == [Clip("deep/b.mp4", "a fox", tmp_path / "deep" / "b.mp4")]


def test_webdataset_shards_group_by_what_is_before_the_first_dot(tmp_path: Path, video: Path) -> None:
    content = video.read_bytes()
    shard(
        tmp_path / "a.tar",
        {"x/0001.mp4": content, "x/0001.txt": b"a fox", "x/0002.left.mp4": content, "x/0002.txt": b"a"},
    )
    found = usable(tmp_path, 9)
    assert [(clip.name, clip.caption) for clip in found] == [
        ("a.tar/x/0001.mp4", "a fox"),
        ("a.tar/x/0002.left.mp4", "a"),
    ]
    assert found[0].content() == content
    assert found[0].stamp() != found[1].stamp()


def test_everything_wrong_is_told_at_once(tmp_path: Path, video: Path) -> None:
    good = video.read_bytes()
    (tmp_path / "good.mp4").write_bytes(good)
    (tmp_path / "good.txt").write_text("a")
    write_clip(tmp_path / "short.mp4", frames=5)
    (tmp_path / "short.txt").write_text("a")
    (tmp_path / "silent.mp4").write_bytes(good)
    (tmp_path / "empty.mp4").write_bytes(good)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "broken.txt").write_text("a")
    with pytest.raises(TrainingError) as told:
        usable(tmp_path, 9)
    text = str(told.value)
    assert text.startswith("4 files cannot be trained on")
    assert "short.mp4: has 5 frames, fewer than the 9" in text
    assert "silent.mp4: no caption" in text
    assert "empty.mp4: its caption is empty" in text
    assert "broken.mp4: cannot be read" in text
    assert "good.mp4" not in text


def test_bad_lines_and_shards_are_faults(tmp_path: Path, video: Path) -> None:
    lines = [
        "{",
        json.dumps({"caption": "a"}),
        json.dumps({"file": "a.mp4"}),
        json.dumps({"file": "no.mp4", "caption": "a"}),
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    with pytest.raises(
        TrainingError,
        match=r"4 files .*a\.mp4: no caption.*line 1: is no JSON.*line 2: must read.*no\.mp4: cannot be read",
    ):
        usable(tmp_path, 9)
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.tar").write_bytes(b"no shard" * 100)
    shard(other / "b.tar", {"1.mp4": video.read_bytes()})
    _, faults = find(other)
    assert [name for name, _ in faults] == ["a.tar", "b.tar/1.mp4"]


def test_pictures_are_clips_of_one_frame(tmp_path: Path, video: Path) -> None:
    pixels = torch.randint(256, (6, 4, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    picture.save(tmp_path / "a.png")
    turned = Image.Exif()
    turned[ORIENTATION] = 6
    picture.rotate(90, expand=True).save(tmp_path / "b.WEBP", lossless=True, exif=turned)
    (tmp_path / "c.mp4").write_bytes(video.read_bytes())
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("a fox")
    assert [clip.name for clip in usable(tmp_path, 1)] == ["a.png", "b.WEBP", "c.mp4"]
    assert [clip.name for clip in usable(tmp_path, 9)] == ["c.mp4"]
    expected = pixels.permute(2, 0, 1)[None, :, None] / 127.5 - 1
    for clip in usable(tmp_path, 1)[:2]:  # the second was taken with the camera on its side
        torch.testing.assert_close(read_frames(clip, 1, 6, 4), expected)


def test_pictures_are_found_in_every_form_and_faults_told(tmp_path: Path) -> None:
    content = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "png")
    (tmp_path / "b.png").write_bytes(content.getvalue())
    (tmp_path / "all.jsonl").write_text(json.dumps({"file": "b.png", "caption": "red"}))
    assert [clip.caption for clip in usable(tmp_path, 1)] == ["red"]
    with pytest.raises(TrainingError, match=r"b\.png: is a picture, and 9 frames are to be trained on"):
        usable(tmp_path, 9)
    other = tmp_path / "other"
    other.mkdir()
    broken = {"2.jpg": b"no picture", "2.txt": b"a", "3.png": content.getvalue()[:50], "3.txt": b"a", "4.png": b""}
    shard(other / "a.tar", {"1.png": content.getvalue(), "1.txt": b"red", **broken})
    with pytest.raises(
        TrainingError, match=r"3 files .*2\.jpg: cannot be read.*3\.png: cannot be read.*4\.png: no cap"
    ):
        usable(other, 1)
    found, _ = find(other, (".png",))
    assert read_frames(found[0], 1, 4, 4).shape == (1, 3, 1, 4, 4)
    with pytest.raises(ValueError, match=r"."):
        read_frames(found[1], 1, 4, 4)


@pytest.mark.parametrize("missing", [True, False])
def test_nothing_to_train_on(tmp_path: Path, missing: bool) -> None:
    folder = tmp_path / "gone" if missing else tmp_path
    with pytest.raises(TrainingError, match="there is no folder" if missing else "holds nothing to train on"):
        usable(folder, 9)


def test_frames_are_scaled_to_cover_and_cut_around_the_middle(clips: Path) -> None:
    clip = usable(clips, 9)[0]
    whole = read_frames(clip, 5, 32, 32)
    assert whole.shape == (1, 3, 5, 32, 32)
    assert -1 <= whole.min() < -0.5
    assert 0.5 < whole.max() <= 1
    wide = read_frames(clip, 5, 16, 32)
    torch.testing.assert_close(wide, whole[..., 8:24, :])
    small = read_frames(clip, 5, 16, 16)
    torch.testing.assert_close(small.mean(), whole.mean(), atol=0.05, rtol=0)
    with pytest.raises(ValueError, match="only 9 of 12 frames"):
        read_frames(clip, 12, 32, 32)
