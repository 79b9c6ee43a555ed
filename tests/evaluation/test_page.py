import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from falloff.evaluation import charts, figures, pareto, report, video
from falloff.evaluation.comparison import Comparison


def test_page_is_self_contained(comparison: Comparison) -> None:
    page = report.html(comparison)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("<video") == 6
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)


def test_images_are_shown_and_written_as_pictures(comparison: Comparison, tmp_path: Path) -> None:
    arms = (comparison.dense, *comparison.methods)
    still = [
        dataclasses.replace(arm, videos=[video.encode_frame(video.read(each)[:1]) for each in arm.videos])
        for arm in arms
    ]
    images = dataclasses.replace(comparison, dense=still[0], methods=still[1:])
    page = report.html(images)
    assert "<video" not in page
    assert "Pictures, same prompt and seed" in page
    assert 'alt="dense: a &quot;quoted&quot; prompt"' in page
    names = [path.name for path in report.write(images, tmp_path)]
    assert sum(name.endswith(".png") for name in names) == 6
    assert not any(name.endswith(".mp4") for name in names)


def test_words_of_users_are_escaped(comparison: Comparison) -> None:
    page = report.html(comparison)
    assert "<b>bold" not in page
    assert "a &lt;b&gt;bold&lt;/b&gt; &amp; red 3 moves right" in page
    assert 'aria-label="dense: a &quot;quoted&quot; prompt"' in page
    assert "models/tiny &lt;wan&gt;" in page


def test_pictures_have_words(comparison: Comparison) -> None:
    page = report.html(comparison)
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", page))
    assert all("aria-" in tag for tag in re.findall(r"<(?:svg|video)[^>]*>", page))


def test_files_of_a_comparison(comparison: Comparison, tmp_path: Path) -> None:
    paths = report.write(comparison, tmp_path / "new" / "folder")
    assert sorted(path.name for path in (tmp_path / "new" / "folder").iterdir()) == sorted(path.name for path in paths)
    assert paths[0].name == "compare.html"
    assert video.read(paths[-1]).shape == (9, 64, 64, 3)
    values = json.loads(paths[1].read_text())
    assert values["methods"][0]["predicted_speedup"] == pytest.approx(comparison.ceiling(0.552))
    assert all("videos" not in arm for arm in (values["dense"], *values["methods"]))


def test_large_videos_are_shrunk_and_the_rest_left_out(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LARGE_VIDEO_BYTES", 1)
    monkeypatch.setattr(report, "SHRUNK_SIDE", 32)
    monkeypatch.setattr(report.page, "BYTES", 9000)
    page = report.html(comparison)
    assert page.count("<video") == 3
    assert "1 more of 2 pairs" in page


def test_shrink_averages() -> None:
    frames = np.zeros((2, 4, 8, 3), np.uint8)
    frames[:, :, ::2] = 200
    small = video.shrink(frames, 4)
    assert small.shape == (2, 2, 4, 3)
    assert (small == 100).all()


def test_figures_tell_the_floor_and_the_spread(comparison: Comparison) -> None:
    rows = {row.name: row.cells for row in figures.rows(comparison)}
    assert rows["PSNR against dense"] == ["floor: identical", "30.4 ± 1.1 dB", "35.5 ± 1.1 dB"]
    assert rows["speed-up"][0] == "1x"
    assert rows["speed-up"][1].startswith("1.42x (1.41 to 1.43)")
    assert rows["attention's share"][0] == "62.0%"
    assert all(len(cells) == 3 for cells in rows.values())


@pytest.mark.parametrize(
    ("values", "words"),
    [([np.inf], "identical"), ([30.0], "30.0 dB"), ([30.0, np.inf], "30.0 dB, 1 of 2 identical")],
)
def test_decibels(values: list[float], words: str) -> None:
    assert figures.decibels(values) == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.0123, "12.3 ms"), (1.5, "1.50 s"), (12.34, "12.3 s"), (125, "2 min 5 s")]
)
def test_seconds(value: float, words: str) -> None:
    assert figures.seconds(value) == words


def test_verdict_names_expectation_and_measurement(comparison: Comparison) -> None:
    words = figures.verdict(comparison, comparison.methods[0])
    assert "54.3% of a dense call" in words
    assert "2.19x" in words
    assert "1.32x be expected" in words
    assert "1.42x was measured" in words


def test_plot_of_a_flat_or_short_curve(comparison: Comparison) -> None:
    flat = dataclasses.replace(comparison.decay[0], distance=[0], mean=[0.1], layers=[[0.1]], fit=None)
    assert "Too few distances" in charts.decay_plot(flat)


def test_map_is_opaque_where_computed() -> None:
    import base64
    import io

    from PIL import Image

    uri = charts.block_map_png(np.array([[255, 0], [128, 255]], np.uint8))
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert np.asarray(image)[..., 3].tolist() == [[255, 0], [128, 255]]


def test_page_draws_every_layer_of_every_step(comparison: Comparison) -> None:
    page = report.html(comparison)
    assert page.count("falloff-run") >= 2
    assert "layer 1, steps 2 to 7: 34.1% of the pairs, cpu, 1 ms a call" in page


def test_pareto_front_keeps_what_none_beats() -> None:
    points = [pareto.Point(name, x, y, y, y) for name, x, y in (("a", 50, 30), ("b", 40, 20), ("c", 60, 25))]
    assert [point.label for point in pareto.front(points)] == ["b", "a"]
    assert [point.label for point in pareto.front([*points, pareto.Point("d", 40, 31, 31, 31)])] == ["d"]


def test_pareto_shows_every_method_that_differs(comparison: Comparison) -> None:
    for plot in (pareto.by_density(comparison), pareto.by_time(comparison)):
        assert plot.count("<circle") == 2
        places = [tuple(map(float, place)) for place in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot)]
        assert places[1][1] < places[0][1]  # the second is closer to dense, hence higher
        assert all(pareto.LEFT <= x <= pareto.WIDTH and 0 <= y <= pareto.HEIGHT for x, y in places)
    round_values = dataclasses.replace(comparison.methods[0], psnr=[20.0, 20.0])
    assert "nan" not in pareto.by_density(dataclasses.replace(comparison, methods=[round_values]))
    equal = dataclasses.replace(comparison.methods[0], psnr=[np.inf, np.inf])
    only = dataclasses.replace(comparison, methods=[equal])
    assert pareto.by_density(only) == ""
    assert "equal the dense ones" in report.html(only)
