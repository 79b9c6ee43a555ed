import math

import pytest
import torch

from falloff.evaluation.metrics import psnr, ssim


def video(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, 3, generator=torch.Generator().manual_seed(seed))


def test_identical_videos() -> None:
    x = video(2, 16, 20)
    assert psnr(x, x.clone()) == math.inf
    assert ssim(x, x.clone()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("difference", "decibel"), [(0.1, 20.0), (0.01, 40.0), (1.0, 0.0)])
def test_psnr_of_a_constant_difference(difference: float, decibel: float) -> None:
    x = torch.zeros(3, 4, 5, 3)
    assert psnr(x, x + difference) == pytest.approx(decibel, abs=1e-5)


def test_psnr_weighs_all_frames_together() -> None:
    x = torch.zeros(2, 4, 4, 3)
    y = x.clone()
    y[1] = 0.1
    assert psnr(x, y) == pytest.approx(-10 * math.log10(0.01 / 2), abs=1e-5)


def test_ssim_of_constant_images_is_the_luminance_term() -> None:
    a, b, c1 = 0.4, 0.6, 0.01**2
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    assert ssim(torch.full((1, 12, 12, 3), a), torch.full((1, 12, 12, 3), b)) == pytest.approx(expected, abs=1e-6)


def test_ssim_agrees_with_a_plain_loop_over_windows() -> None:
    x, y = video(1, 13, 12, seed=1), video(1, 13, 12, seed=2)
    line = torch.exp(-((torch.arange(11.0).double() - 5) ** 2) / (2 * 1.5**2))
    weight = torch.outer(line, line) / line.sum() ** 2
    values = []
    for top in range(3):
        for left in range(2):
            for channel in range(3):
                a, b = (v[0, top : top + 11, left : left + 11, channel].double() for v in (x, y))
                ma, mb = (weight * a).sum(), (weight * b).sum()
                va, vb = (weight * (a - ma) ** 2).sum(), (weight * (b - mb) ** 2).sum()
                cov = (weight * (a - ma) * (b - mb)).sum()
                c1, c2 = 1e-4, 9e-4
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    assert ssim(x, y) == pytest.approx(float(torch.stack(values).mean()), abs=1e-9)


def test_ssim_is_the_mean_over_frames() -> None:
    x, y = video(2, 12, 12, seed=1), video(2, 12, 12, seed=2)
    assert ssim(x, y) == pytest.approx((ssim(x[:1], y[:1]) + ssim(x[1:], y[1:])) / 2)


@pytest.mark.parametrize("metric", [psnr, ssim])
def test_videos_that_do_not_fit(metric) -> None:
    with pytest.raises(ValueError, match=r"one shape .*\(1, 12, 12, 3\) and \(2, 12, 12, 3\)"):
        metric(video(1, 12, 12), video(2, 12, 12))
    with pytest.raises(TypeError, match="uint8"):
        metric(torch.zeros(1, 12, 12, 3, dtype=torch.uint8), video(1, 12, 12))


def test_ssim_needs_a_window() -> None:
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(video(1, 10, 12), video(1, 10, 12))
