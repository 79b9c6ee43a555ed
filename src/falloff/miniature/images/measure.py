"""What decoding in fewer steps costs the image miniature: is the asked digit drawn, and as people draw it.

Pictures are read by the judge's classifier, trained on the real scans. Quality is the share read as asked, and the
Frechet distance between its features of generated pictures and those of the training scans.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from falloff.decoding.pipeline import LPDPipeline
from falloff.decoding.tokenizer import VQTokenizer
from falloff.miniature.digits import held_out_scans, training_scans
from falloff.miniature.images import judge as shipped_judge
from falloff.miniature.images.pictures import pictures
from falloff.miniature.images.tokenizer import reconstruct
from falloff.miniature.judge import crop, train_classifier

WAYS: dict[str, dict[str, Any]] = {
    "one by one": {"num_inference_steps": 256, "order": "random"},
    "one by one, raster": {"num_inference_steps": 256, "order": "raster"},
    "20 steps, locality": {"num_inference_steps": 20, "order": "locality"},
    "20 steps, planned": {"num_inference_steps": 20, "order": "planned"},
    "20 steps, halton": {"num_inference_steps": 20, "order": "halton"},
    "20 steps, random": {"num_inference_steps": 20, "order": "random"},
    "20 steps, raster": {"num_inference_steps": 20, "order": "raster"},
}
"""Call arguments to be compared."""


class Judge:
    """Reads pictures. ``file``: the classifier, trained there first if it is missing; the shipped one by default."""

    def __init__(self, file: Path | None = None) -> None:
        classifier = train_classifier(file or shipped_judge())
        assert isinstance(classifier, torch.nn.Sequential)
        self.trunk, self.last = classifier[:-2], classifier[-2:]
        self.real = self.features(pictures(training_scans)[0])[0]

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Of pictures [n, 1, SIDE, SIDE] in [-1, 1]: features, float64 [n, 64], and the digits read, [n]."""
        maps = self.trunk(torch.from_numpy(np.stack([_centred(image) for image in images])))
        return maps.mean(dim=(2, 3)).double(), self.last(maps).argmax(dim=1)

    def score(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """``frechet`` is ``None`` of no more pictures than features, whose covariance has no full rank."""
        features, read = self.features(images)
        return {
            "pictures": len(images),
            "accuracy": float((read == labels).double().mean()),
            "frechet": frechet(features, self.real) if len(features) > features.shape[1] else None,
        }


def _centred(image: Tensor) -> Any:
    """The classifier's view of a picture, [1, PATCH, PATCH] opacity, around its digit."""
    opacity = ((image[0] + 1) / 2).numpy()
    rows, columns = np.nonzero(opacity > 0.5)
    middle = (int(rows.mean()), int(columns.mean())) if len(rows) else (len(opacity) // 2,) * 2
    return crop(opacity, *middle)[None]


def frechet(a_ND: Tensor, b_ND: Tensor) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), of normal distributions fitted to both."""
    cov_a, cov_b = torch.cov(a_ND.T), torch.cov(b_ND.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # The product's eigenvalues are those of the symmetric root C_b root, which cannot be negative.
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    apart = (a_ND.mean(dim=0) - b_ND.mean(dim=0)).square().sum()
    return float(apart + cov_a.trace() + cov_b.trace() - 2 * middle)


def limits(judge: Judge, vae: VQTokenizer) -> dict[str, Any]:
    """Scores of real pictures that nothing was trained on, and of the same through the tokenizer."""
    images, labels = pictures(held_out_scans)
    rebuilt = reconstruct(vae, images)
    error = (rebuilt - images).square().mean(dim=(1, 2, 3)) / 4
    return {
        "held-out scans": judge.score(images, labels),
        "held-out scans, tokenized": {
            **judge.score(rebuilt, labels),
            "psnr_db": float(-10 * error.log10().mean()),
        },
    }


def compare(
    pipe: LPDPipeline, judge: Judge, ways: Mapping[str, Mapping[str, Any]], samples: int, together: int = 50
) -> dict[str, Any]:
    """Each way's score over ``samples`` pictures of all digits in turn, and seconds for a batch of ``together``.

    ``times_faster`` compares those seconds with the first way's; ``None`` where no batch was full.

    Batches of all ways are interleaved, so that a machine that warms up or slows down favours none.
    """
    drawn: dict[str, list[Tensor]] = {name: [] for name in ways}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    labels = torch.arange(samples) % 10
    for number, part in enumerate(track(torch.split(labels, together), description="pictures")):
        for name, arguments in ways.items():
            generator = torch.Generator().manual_seed(number)
            began = time.perf_counter()
            images = pipe(part.tolist(), generator=generator, output_type="pt", **arguments).images
            if len(part) == together:
                seconds[name].append(time.perf_counter() - began)
            drawn[name].append(images.float() * 2 - 1)
    medians = {name: median(each) if each else None for name, each in seconds.items()}
    first = next(iter(medians.values()))
    rows = {}
    for name, arguments in ways.items():
        taken = medians[name]
        rows[name] = {
            **arguments,
            **judge.score(torch.cat(drawn[name]), labels),
            "batch": together,
            "seconds_per_batch": taken,
            "times_faster": first / taken if first and taken else None,
        }
    return rows
