"""Fidelity: how close two videos are, pixel by pixel and structure by structure.

Videos are float [F, H, W, 3] with values in 0 to 1; an image is a video of one frame.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d

WINDOW, SIGMA = 11, 1.5
C1, C2 = 0.01**2, 0.03**2


def psnr(video_FHWC: Tensor, reference_FHWC: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, ``10 log10(1 / mean((x - y)^2))`` over the whole video; equal: ``inf``.

    Raises ``ValueError`` when the two are not videos of the same shape.
    """
    _check(video_FHWC, reference_FHWC)
    pairs = zip(video_FHWC, reference_FHWC, strict=True)
    squares = sum(float((x.double() - y.double()).square().sum()) for x, y in pairs)
    return -10.0 * math.log10(squares / video_FHWC.numel()) if squares else math.inf


def ssim(video_FHWC: Tensor, reference_FHWC: Tensor) -> float:
    """Structural similarity (Wang et al. 2004), -1 to 1, mean over positions, colours and frames.

    With means m, variances v and the covariance c of two 11 x 11 windows, weighted by a Gaussian of sigma 1.5:

        ssim = (2 m_x m_y + C1) (2 c + C2) / ((m_x^2 + m_y^2 + C1) (v_x + v_y + C2)),  C1 = 0.01^2, C2 = 0.03^2

    over the windows that lie wholly inside the frame. Raises ``ValueError`` when the two are not videos of the
    same shape or are smaller than a window.
    """
    _check(video_FHWC, reference_FHWC)
    if min(video_FHWC.shape[1:3]) < WINDOW:
        raise ValueError(f"ssim needs frames of at least {WINDOW} x {WINDOW}, got {tuple(video_FHWC.shape[1:3])}")
    frames = [_frame_ssim(x, y) for x, y in zip(video_FHWC, reference_FHWC, strict=True)]
    return sum(frames) / len(frames)


def _frame_ssim(x_HWC: Tensor, y_HWC: Tensor) -> float:
    # float64: variances are small differences of large squares
    x, y = (frame.double().permute(2, 0, 1)[:, None] for frame in (x_HWC, y_HWC))
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    above = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    below = (mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2)
    return float((above / below).mean())


def _blur(image_C1HW: Tensor) -> Tensor:
    """Gaussian mean of every window that lies inside the image."""
    offset = torch.arange(WINDOW, dtype=image_C1HW.dtype, device=image_C1HW.device) - WINDOW // 2
    weight = torch.softmax(-(offset**2) / (2 * SIGMA**2), 0)
    return conv2d(conv2d(image_C1HW, weight.view(1, 1, -1, 1)), weight.view(1, 1, 1, -1))


def _check(video: Tensor, reference: Tensor) -> None:
    if video.shape != reference.shape or video.ndim != 4 or video.shape[-1] != 3 or not video.numel():
        raise ValueError(
            "expected two videos of one shape [frames, height, width, 3], "
            f"got {tuple(video.shape)} and {tuple(reference.shape)}"
        )
    if not (video.is_floating_point() and reference.is_floating_point()):
        raise TypeError(f"expected float videos in 0 to 1, got {video.dtype} and {reference.dtype}")
