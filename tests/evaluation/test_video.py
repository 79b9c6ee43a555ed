from pathlib import Path

import numpy as np
import pytest

from falloff.evaluation import files, video


def gradient(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth moving gradient, float in 0 to 1."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    return np.stack([x / width, y / height, (t + 1) / (frames + 1) + 0 * x], -1)


def test_round_trip(tmp_path: Path) -> None:
    frames = gradient()
    video.write(tmp_path / "out.mp4", frames, fps=16)
    back = video.read(tmp_path / "out.mp4")
    assert back.shape == frames.shape
    assert np.abs(back / 255 - frames).mean() < 0.02
    assert [path.name for path in tmp_path.iterdir()] == ["out.mp4"]


def test_one_frame_is_a_picture_of_the_same_pixels(tmp_path: Path) -> None:
    frame = video.to_bytes(gradient(1, 17, 19))
    video.write(tmp_path / "out.PNG", frame, fps=16)
    content = (tmp_path / "out.PNG").read_bytes()
    assert video.is_picture(content)
    assert (video.read(content) == frame).all()
    assert video.as_file(frame, fps=16) == content
    assert not video.is_picture(video.as_file(gradient(2), fps=16))


def test_a_picture_of_several_frames_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one frame, got 5"):
        video.write(tmp_path / "out.png", gradient(), fps=16)
    assert not list(tmp_path.iterdir())


def test_odd_sizes_repeat_the_edge() -> None:
    assert video.read(video.encode(gradient(3, 17, 19), fps=8)).shape == (3, 18, 20, 3)


def test_fps_is_kept() -> None:
    import io

    import av

    with av.open(io.BytesIO(video.encode(gradient(), fps=23.976))) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(23.976, abs=1e-3)


@pytest.mark.parametrize("frames", [np.zeros((2, 4, 4)), np.zeros((0, 4, 4, 3)), np.zeros((1, 4, 4, 3), dtype=int)])
def test_not_a_video(frames: np.ndarray) -> None:
    with pytest.raises(ValueError, match="a video"):
        video.encode(frames, fps=8)


def test_output_under_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match="is a file, not a folder"):
        video.write(tmp_path / "file" / "out.mp4", gradient(), fps=8)


def test_interrupted_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("falloff.evaluation.files.os.replace", interrupt)
    (tmp_path / "a.json").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        files.write(tmp_path / "a.json", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"
