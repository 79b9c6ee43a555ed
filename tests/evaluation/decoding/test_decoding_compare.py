"""Ways to decode compared on a tiny random pipeline: figures, page, files."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.append(str(Path(__file__).parents[2] / "decoding"))

from falloff.decoding import LPDPipeline, make_orders
from falloff.decoding.sizes import group_sizes
from falloff.evaluation.decoding import figures, report
from falloff.evaluation.decoding.compare import compare
from falloff.evaluation.decoding.comparison import Comparison

CLASSES, SEEDS, STEPS = [0, 3], (0, 1), 6


class Reader:
    """A judge that notes what it is shown."""

    def __init__(self, frechet: float | None) -> None:
        self.shown: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.frechet = frechet

    def score(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float | None]:
        self.shown.append((images, labels))
        return {"accuracy": 0.75, "frechet": self.frechet}


@pytest.fixture(scope="module")
def pipe() -> LPDPipeline:
    from decoders import model, tokenizer

    return LPDPipeline(model(torch.float32), tokenizer())


@pytest.fixture(scope="module")
def found(pipe: LPDPipeline) -> Comparison:
    told: list[tuple[int, int]] = []
    made = compare(
        pipe,
        CLASSES,
        seeds=SEEDS,
        num_inference_steps=STEPS,
        guidance_scale=1.5,
        progress=lambda now: told.append((now.done, now.total)),
    )
    assert told == [(n, 32) for n in range(1, 33)]  # five ways, and one by one in the order of three of them
    return made


@pytest.fixture(scope="module")
def judged(pipe: LPDPipeline) -> tuple[Comparison, Reader]:
    reader = Reader(None)
    return compare(pipe, CLASSES, num_inference_steps=STEPS, judge=reader), reader


def codes(pipe: LPDPipeline, label: int, seed: int, **arguments: object) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(label, guidance_scale=1.5, generator=generator, output_type="latent", **arguments).images


def test_every_way_is_timed_on_every_class_and_seed(found: Comparison) -> None:
    assert [arm.label for arm in found.arms] == ["sequential", "LPD", "planned order", "random order", "raster order"]
    assert [arm.steps for arm in found.arms] == [15, *[STEPS] * 4]
    assert [(asked.label, asked.seed) for asked in found.asked] == [(0, 0), (0, 1), (3, 0), (3, 1)]
    for arm in found.arms:
        assert len(arm.seconds) == len(arm.pictures) == 4
        assert found.speedup(arm) == median(a / b for a, b in zip(found.sequential.seconds, arm.seconds, strict=True))


def test_pictures_are_those_of_plain_calls(found: Comparison, pipe: LPDPipeline, tmp_path: Path) -> None:
    report.write(found, tmp_path)
    picture = pipe.draw(codes(pipe, 3, 1, num_inference_steps=STEPS, order="locality"))[0]
    with Image.open(tmp_path / "class-3-seed-1-LPD.png") as written:
        assert np.abs(np.asarray(written).astype(int) - np.asarray(picture).astype(int)).max() <= 1


@pytest.mark.parametrize("place", [1, 2, 3, 4])
def test_tokens_kept_are_those_of_one_by_one_decoding_with_the_same_draws(
    found: Comparison, pipe: LPDPipeline, place: int
) -> None:
    arm = found.arms[place]
    height, width = pipe.transformer.config.grid_height, pipe.transformer.config.grid_width
    shares = []
    for asked in found.asked:
        generator = torch.Generator().manual_seed(asked.seed)
        orders = make_orders(arm.order, height, width, arm.sizes, 1, generator)
        twin = pipe(
            asked.label,
            order=orders,
            sizes=(1,) * 15,
            guidance_scale=1.5,
            generator=generator,
            output_type="latent",
        ).images
        parallel = codes(pipe, asked.label, asked.seed, order=arm.order, sizes=arm.sizes)
        shares.append(float((twin == parallel).double().mean()))
    assert arm.agreement == shares
    assert found.chance is not None
    assert np.mean(shares) > found.chance
    assert found.sequential.agreement is None


def test_orders_are_shown_as_they_were(found: Comparison) -> None:
    raster = found.arms[4].groups
    assert raster.shape == (3, 5)
    assert (np.diff(raster.reshape(-1).astype(int)) <= 0).all()
    for arm in found.arms:
        steps, sizes = np.unique(arm.groups, return_counts=True)
        assert tuple(sizes[::-1]) == arm.sizes
        assert steps[-1] == 255
        order = make_orders(arm.order, 3, 5, arm.sizes, 1, torch.Generator().manual_seed(0))[0].numpy()
        assert (np.diff(arm.groups.reshape(-1)[order].astype(int)) <= 0).all()


def test_a_judge_reads_all_pictures_and_nothing_else_is_told(
    judged: tuple[Comparison, Reader], pipe: LPDPipeline
) -> None:
    found, reader = judged
    assert len(reader.shown) == 5
    for images, labels in reader.shown:
        assert images.shape == (2, 3, 12, 20)
        assert -1 <= float(images.min()) < 0 < float(images.max()) <= 1
        assert labels.tolist() == CLASSES
    assert found.chance is None
    rows = {row.name: row.cells for row in figures.rows(found)}
    assert rows["read as asked"] == ["75.0%"] * 5
    assert not {"Frechet distance", "tokens kept"} & set(rows)
    assert "of 2 pictures 75.0% are read" in figures.verdict(found, found.parallel[0])
    enough = compare(pipe, [0], num_inference_steps=STEPS, judge=Reader(1.25))
    assert {row.name: row.cells for row in figures.rows(enough)}["Frechet distance"] == ["1.250"] * 5
    assert "Frechet distance" in report.html(enough).split("<h2>")[0]


def test_figures_without_a_judge(found: Comparison) -> None:
    rows = {row.name: row.cells for row in figures.rows(found)}
    assert rows["steps"] == ["15", *["6"] * 4]
    assert rows["tokens kept"][0].startswith("chance: ")
    assert "read as asked" not in rows
    assert rows["computed"][0].endswith("MFLOP")
    assert "there is no judge" in figures.verdict(found, found.parallel[0])
    assert figures.table(found).row_count == len(rows)


def test_attention_is_of_all_distances_and_layers(found: Comparison) -> None:
    curve = found.attention
    assert curve.distance == [1, 2, 3, 4]
    assert len(curve.layers) == 2
    np.testing.assert_allclose(np.mean(curve.layers, axis=0), curve.mean)
    assert 0.5 < np.mean(curve.mean) / curve.uniform < 2


def test_page_is_self_contained(found: Comparison) -> None:
    page = report.html(found)
    assert not re.findall(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert not re.findall(r"@import|https?://", page)
    assert "$" not in re.sub(r"base64,[^\"]*", "", page)
    assert page.count('<img class="small"') == 20
    assert all("alt=" in tag for tag in re.findall(r"<img[^>]*>", page))
    assert "<h1>What fewer steps gained, and what they cost</h1>" in page
    assert "<script" not in page


def test_pictures_without_room_are_left_out(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    first = sum(len(arm.pictures[0]) for arm in found.arms)
    monkeypatch.setattr(report.page, "BYTES", first + 10)
    page = report.html(found)
    assert page.count('<img class="small"') == 5
    assert "3 more of 4 pictures by each way are in the folder" in page


def test_files(found: Comparison, tmp_path: Path) -> None:
    paths = report.write(found, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted(path.name for path in paths)
    assert [path.name for path in paths[:3]] == ["compare.html", "compare.json", "attention.svg"]
    values = json.loads(paths[1].read_text())
    assert values["parallel"][0]["speedup"] == pytest.approx(found.speedup(found.parallel[0]))
    assert values["parallel"][3]["sizes"] == list(group_sizes(15, STEPS))
    assert "pictures" not in values["sequential"]
    drawing = ElementTree.parse(paths[2]).getroot()
    assert drawing.tag.endswith("}svg")
    assert drawing[0].tag.endswith("}style")
    assert len(drawing.findall("{http://www.w3.org/2000/svg}circle")) == 4


def test_what_cannot_be_compared_is_refused(pipe: LPDPipeline) -> None:
    with pytest.raises(ValueError, match="at least one class and one seed"):
        compare(pipe, [])
    with pytest.raises(ValueError, match=r"classes 0 to 3, got \[4\]"):
        compare(pipe, [0, 4], num_inference_steps=STEPS)
    with pytest.raises(TypeError, match="takes no argument 'order' here; legal are num_inference_steps, guidance"):
        compare(pipe, [0], order="raster")
    with pytest.raises(ValueError, match="15 tokens are decoded in 2 to 15 steps, got 20"):
        compare(pipe, [0])
