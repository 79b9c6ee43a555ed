"""The miniature's tokenizer: 4 x 4 px to one of 128 codes, trained with a straight-through gradient."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor
from torch.nn.functional import mse_loss, normalize

from falloff.decoding.tokenizer import VQTokenizer
from falloff.miniature.digits import training_scans
from falloff.miniature.images.pictures import pictures
from falloff.miniature.muon import optimizers, set_rate
from falloff.training_state import load_state, save_state, seeded

CODES = 128
BATCH = 16
RESEED_EVERY = 20
"""Steps after which codes that nothing was nearest to are set to latents of the last batch."""


def build() -> VQTokenizer:
    """The untrained tokenizer (about 0.5 M parameters)."""
    model: VQTokenizer = VQTokenizer(
        width=16, multipliers=(1, 2, 3), blocks=1, latent_channels=32, codes=CODES, code_dim=8, channels=1, groups=8
    )
    return model


def train(folder: Path, seconds: float) -> VQTokenizer:
    """Train for ``seconds`` in all, going on from ``folder``/tokenizer.pt."""
    model = seeded(build)
    # The codebook's rows are directions, not a map: they are none of Muon's matrices.
    matrices = (p for p in model.parameters() if p.ndim == 4 and len(p) > 3)
    both = optimizers(matrices, model, rates=(0.03, 3e-3))
    parts = {"model": model, **both}
    spent, step = load_state(folder / "tokenizer.pt", parts)
    began, saved = time.monotonic() - spent, time.monotonic()
    images, _ = pictures(training_scans)
    used = torch.zeros(CODES)
    with Progress() as progress:
        bar = progress.add_task("tokenizer", total=seconds, completed=int(spent))
        while (spent := time.monotonic() - began) < seconds:
            set_rate(both.values(), min(1.0, (step + 1) / 30) * (0.02 + 0.98 * _cosine(spent / seconds)))
            chosen = np.random.default_rng([21, step]).integers(len(images), size=BATCH)
            error, codes, latents = _step(model, both.values(), images[chosen])
            used += torch.bincount(codes.flatten(), minlength=CODES)
            step += 1
            if step % RESEED_EVERY == 0 and spent < 0.7 * seconds:
                _reseed(model, used, latents, np.random.default_rng([22, step]))
                used.zero_()
            if time.monotonic() - saved > 60:
                save_state(folder / "tokenizer.pt", parts, spent, step)
                saved = time.monotonic()
            progress.update(bar, completed=spent, description=f"tokenizer, step {step}, error {error:.4f}")
    save_state(folder / "tokenizer.pt", parts, seconds, step)
    model.eval()
    return model


def _cosine(done: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))


def _step(
    model: VQTokenizer, optimizers: Iterable[torch.optim.Optimizer], images: Tensor
) -> tuple[float, Tensor, Tensor]:
    """One step; returns the squared error, the codes and the unit latents."""
    latents = normalize(model.latents(images), dim=1)
    codes = model.quantize.nearest(latents)
    rows = model.quantize(codes)
    rebuilt = model.decode_latents(latents + (rows - latents).detach())
    error = mse_loss(rebuilt, images)
    commitment = mse_loss(rows, latents.detach()) + 0.25 * mse_loss(latents, rows.detach())
    torch.autograd.backward(error + 0.05 * (rebuilt - images).abs().mean() + commitment)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(error.detach()), codes, latents.detach()


@torch.no_grad()
def _reseed(model: VQTokenizer, used: Tensor, latents_BCHW: Tensor, rng: np.random.Generator) -> None:
    """Unused codes become random latents."""
    dead = (used == 0).nonzero()[:, 0]
    flat = latents_BCHW.movedim(1, -1).flatten(0, 2)
    model.quantize.embedding.weight[dead] = flat[torch.from_numpy(rng.integers(len(flat), size=len(dead)))]


@torch.no_grad()
def encode(model: VQTokenizer, images: Tensor, together: int = 64) -> Tensor:
    """Codes uint8 [count, tokens] in raster order."""
    return torch.cat([model.encode(part).flatten(1).to(torch.uint8) for part in torch.split(images, together)])


@torch.no_grad()
def reconstruct(model: VQTokenizer, images: Tensor, together: int = 64) -> Tensor:
    """Images through codes and back."""
    return torch.cat([model.decode(model.encode(part)).clamp(-1, 1) for part in torch.split(images, together)])
