import pytest
import torch

from falloff.decoding import LPDPipeline
from falloff.miniature.digits import held_out_scans, training_scans
from falloff.miniature.images import measure, tokenizer, transformer
from falloff.miniature.images.pictures import pictures
from falloff.training_state import seeded


@pytest.fixture(scope="module")
def reader() -> measure.Judge:
    return measure.Judge()


def test_frechet_of_normal_distributions_is_the_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    spread = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    shifted = torch.randn(20000, 3, generator=generator, dtype=torch.float64) * spread + torch.tensor([2.0, 0.0, 0.0])
    # |mean|^2 + sum (1 - spread)^2
    assert measure.frechet(noise, shifted) == pytest.approx(4 + 0 + 1 + 4, rel=0.03)
    assert measure.frechet(noise, noise) == pytest.approx(0, abs=1e-9)
    rotated = noise @ torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))[0]
    assert measure.frechet(noise, rotated) == pytest.approx(0, abs=0.01)


def test_real_pictures_score_well_and_others_do_not(reader: measure.Judge) -> None:
    images, labels = pictures(held_out_scans)
    good = reader.score(images, labels)
    assert good["pictures"] == len(images)
    assert good["accuracy"] > 0.97
    assert reader.score(images, (labels + 1) % 10)["accuracy"] < 0.1
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert reader.score(noise, labels)["frechet"] > 5 * good["frechet"]
    images, labels = pictures(training_scans)
    zeros = labels == 0
    assert reader.score(images[zeros], labels[zeros])["frechet"] > 3 * good["frechet"]
    few = reader.score(torch.full((2, 1, 64, 64), -1.0), labels[:2])
    assert (few["pictures"], few["frechet"]) == (2, None)


def test_ways_are_compared(reader: measure.Judge) -> None:
    pipe = LPDPipeline(seeded(transformer.build).eval(), seeded(tokenizer.build).eval())
    pipe.set_progress_bar_config(disable=True)
    ways = {name: {"num_inference_steps": 2, "order": name, "guidance_scale": 1.0} for name in ("random", "raster")}
    found = measure.compare(pipe, reader, ways, samples=3, together=2)
    assert list(found) == ["random", "raster"]
    for name, row in found.items():
        assert (row["order"], row["pictures"], row["batch"]) == (name, 3, 2)
        assert row["times_faster"] == found["random"]["seconds_per_batch"] / row["seconds_per_batch"]
        assert 0 <= row["accuracy"] <= 1
    assert measure.limits(reader, pipe.vae)["held-out scans, tokenized"]["psnr_db"] < 30
