"""The miniature's autoencoder: `AutoencoderKLWan`, 8x8 px and 4 frames to a latent of 8 channels.

It is trained on crops of 64x64 px that hold parts of digits: four times cheaper than full frames and dense
in foreground. The posterior's spread is fixed (see `SPREAD`), which gives the smooth latents that diffusion
likes without the collapse that a KL term risks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from rich.progress import Progress

from falloff.miniature import digits
from falloff.miniature.muon import optimizers, set_rate
from falloff.training_state import load_state, save_state, seeded

SPREAD = 0.1  # the posterior's standard deviation, where latents have about 1
CANVAS, CROP = 96, 64  # px
CHANNELS = 8


def build() -> AutoencoderKLWan:
    """The untrained autoencoder (about 1 M parameters)."""
    vae = AutoencoderKLWan(
        base_dim=12,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        attn_scales=[],
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        scale_factor_temporal=4,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
    )
    # Half of the outputs are the log-variance. Training never reads them, so they stay what they are here.
    with torch.no_grad():
        vae.quant_conv.weight[CHANNELS:] = 0
        vae.quant_conv.bias[CHANNELS:] = 2 * math.log(SPREAD)
    return vae


def train(folder: Path, seconds: float) -> AutoencoderKLWan:
    """Train for `seconds` in all, resuming from `folder`/autoencoder.pt."""
    vae = seeded(build)
    both = optimizers((p for p in vae.parameters() if p.ndim >= 4 and len(p) > 3), vae, rates=(0.05, 2e-3))
    parts = {"model": vae, **both}
    spent, step = load_state(folder / "autoencoder.pt", parts)
    began, saved = time.monotonic() - spent, time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("autoencoder", total=seconds, completed=int(spent))
        while (spent := time.monotonic() - began) < seconds:
            set_rate(both.values(), min(1.0, (step + 1) / 30) * (0.01 + 0.99 * _cosine(spent / seconds)))
            frames = (1, 1, 5) if spent < seconds / 5 else (5, 9, 13)
            loss = _step(vae, both.values(), np.random.default_rng([1, step]), frames)
            step += 1
            if step % 50 == 0:
                progress.console.print(f"step {step} {spent:.0f} s loss {loss:.4f}", highlight=False)
            if time.monotonic() - saved > 60:
                save_state(folder / "autoencoder.pt", parts, spent, step)
                saved = time.monotonic()
            progress.update(bar, completed=spent)
    save_state(folder / "autoencoder.pt", parts, seconds, step)
    return vae.eval()


def _cosine(done: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * min(1.0, done))


def _step(
    vae: AutoencoderKLWan,
    optimizers: Iterable[torch.optim.Optimizer],
    rng: np.random.Generator,
    lengths: tuple[int, ...],
) -> float:
    frames = int(rng.choice(lengths))
    # About equal work whatever the length.
    video = torch.stack([digits.as_video(_crop(rng, frames)) for _ in range(min(16, 36 // frames))])
    mean = vae.encode(video).latent_dist.mean
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(int(rng.integers(2**31))))
    out = vae.decode(mean + SPREAD * noise).sample
    error = out - video
    # The digits fill a fifth of the picture and hold all of its content.
    weight = 1 + 3 * (video.amax(dim=1, keepdim=True) > 2 * digits.BACKGROUND * 2 - 1)
    fit = (weight * (error.square() + 0.05 * error.abs())).mean()
    loss = fit + 2e-3 * mean.square().mean()
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _crop(rng: np.random.Generator, frames: int) -> digits.Floats:
    text = digits.caption(digits.draw_wishes(rng, int(rng.integers(1, 3))))
    clip = digits.render(digits.draw_scene(rng, text, digits.training_scans, CANVAS), frames, CANVAS)
    x, y = rng.integers(0, CANVAS - CROP + 1, size=2)
    return clip[:, y : y + CROP, x : x + CROP]


@torch.no_grad()
def set_statistics(vae: AutoencoderKLWan, clips: int = 48) -> None:
    """Write the latents' mean and deviation per channel, over full-size training clips, to the config."""
    rng = np.random.default_rng(2)
    found = []
    for i in range(clips):
        text = digits.draw_caption(rng, 1 + i % 2, heldout=False)
        video = digits.as_video(digits.render(digits.draw_scene(rng, text), 17))[None]
        found.append(vae.encode(video).latent_dist.mean)
    latents = torch.cat(found)
    vae.register_to_config(
        latents_mean=[round(float(v), 4) for v in latents.mean(dim=(0, 2, 3, 4))],
        latents_std=[round(float(v), 4) for v in latents.std(dim=(0, 2, 3, 4))],
    )


def held_out_clips(count: int, frames: int) -> list[tuple[str, digits.Floats]]:
    """Captions and full-size clips of held-out captions drawn with held-out scans, always the same ones."""
    rng = np.random.default_rng(3)
    prompts = digits.held_out_prompts(count, seed=3)
    return [(t, digits.render(digits.draw_scene(rng, t, digits.held_out_scans), frames)) for t in prompts]


@torch.no_grad()
def reconstruct(vae: AutoencoderKLWan, clip: digits.Floats) -> digits.Floats:
    """The clip, [F, H, W, 3] in [0, 1], encoded (to the posterior's mode) and decoded."""
    latents = vae.encode(digits.as_video(clip)[None]).latent_dist.mode()
    out: torch.Tensor = vae.decode(latents).sample[0]
    return np.asarray((out.permute(1, 2, 3, 0).numpy() + 1) / 2, dtype=np.float32)


def psnr(a: digits.Floats, b: digits.Floats) -> float:
    """`-10 log10(mean squared error)` in dB, for values in [0, 1]."""
    return float(-10 * np.log10(np.mean(np.square(a - b))))
