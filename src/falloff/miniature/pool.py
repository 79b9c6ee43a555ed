"""Training clips as latents: encoded once, kept on disk, seen many times with fresh noise.

Encoding is dear, so clips of one digit are also added up to clips of two: the autoencoder sees only a small
surrounding, so what two digits that keep apart add to an empty clip's latents adds up too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from rich.progress import track

from falloff.miniature import digits


@dataclass(frozen=True)
class Recipe:
    """`clips` clips of `frames` frames on a canvas of `size` px, of which the share `pairs` shows two digits.

    When clips are drawn, the share `composed` is made up from two clips of one digit.
    """

    name: str
    size: int
    frames: int
    clips: int
    pairs: float
    composed: float


@dataclass(frozen=True)
class Pool:
    """Normalised latents [clips, channels, frames, height, width] in half precision, and their captions.

    `empty`, [channels, frames, height, width], is the clip without a digit. Clips with a held-out caption
    serve as a half of a composed clip only.
    """

    latents: torch.Tensor
    captions: list[str]
    empty: torch.Tensor
    composed: float

    @cached_property
    def trainable(self) -> list[int]:
        """The clips that may be seen by themselves."""
        return [i for i, c in enumerate(self.captions) if not digits.held_out(c)]

    def draw(self, rng: np.random.Generator, count: int, frames: int) -> tuple[torch.Tensor, list[str]]:
        """`count` clips' first `frames` latent frames. The autoencoder is causal: a cut is a shorter clip."""
        makers = [self._compose if rng.random() < self.composed else self._one for _ in range(count)]
        drawn = [make(rng, frames) for make in makers]
        return torch.stack([latents for latents, _ in drawn]), [caption for _, caption in drawn]

    def _one(self, rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, str]:
        chosen = int(rng.choice(self.trainable))
        return self.latents[chosen, :, :frames].float(), self.captions[chosen]

    def _compose(self, rng: np.random.Generator, frames: int) -> tuple[torch.Tensor, str]:
        """Of the pairs of one clip with 12 others the one that overlaps least."""
        empty = self.empty[:, :frames].float()
        first, *others = (int(i) for i in rng.choice(len(self.captions), size=13, replace=False))
        fitting = [i for i in others if _fits(self.captions[first], self.captions[i])]
        if not fitting:
            return self._one(rng, frames)
        one = self.latents[first, :, :frames].float() - empty
        more = self.latents[fitting, :, :frames].float() - empty
        overlap = (one.square().sum(dim=0) * more.square().sum(dim=1)).sum(dim=(1, 2, 3))
        best = int(overlap.argmin())
        return empty + one + more[best], f"{self.captions[first]} and {self.captions[fitting[best]]}"


def _fits(first: str, second: str) -> bool:
    """Whether two captions make one for training: of different colours, and not held out together."""
    colours = {w.colour for caption in (first, second) for w in digits.parse(caption)}
    return len(colours) == 2 and not digits.held_out(f"{first} and {second}")


def load(recipe: Recipe, vae: AutoencoderKLWan, folder: Path) -> Pool:
    """The recipe's pool from `folder`, made there first if it is missing."""
    file = folder / f"pool-{recipe.name}.pt"
    if not file.exists():
        made = _make(recipe, vae)
        beside = file.with_suffix(".part")
        torch.save(made, beside)
        os.replace(beside, file)
    latents, captions, empty = torch.load(file, weights_only=True)
    return Pool(latents, captions, empty, recipe.composed)


@torch.no_grad()
def _make(recipe: Recipe, vae: AutoencoderKLWan, together: int = 10) -> tuple[torch.Tensor, list[str], torch.Tensor]:
    rng = np.random.default_rng([5, recipe.size, recipe.frames])
    captions: list[str] = []
    latents = []
    for _ in track(range(recipe.clips // together), description=f"clips {recipe.name}"):
        texts = [_draw_caption(rng, recipe) for _ in range(together)]
        scenes = [digits.draw_scene(rng, t, size=recipe.size) for t in texts]
        latents.append(_encode(vae, [digits.render(s, recipe.frames, recipe.size) for s in scenes]))
        captions += texts
    empty = _encode(vae, [digits.render((), recipe.frames, recipe.size)])[0]
    return torch.cat(latents), captions, empty


def _draw_caption(rng: np.random.Generator, recipe: Recipe) -> str:
    if recipe.composed:
        return digits.caption(digits.draw_wishes(rng, 1))
    return digits.draw_caption(rng, 1 + int(rng.random() < recipe.pairs), heldout=False)


def _encode(vae: AutoencoderKLWan, clips: list[digits.Floats]) -> torch.Tensor:
    video = torch.stack([digits.as_video(c) for c in clips])
    return normalise(vae, vae.encode(video).latent_dist.mode()).half()


def normalise(vae: AutoencoderKLWan, latents: torch.Tensor) -> torch.Tensor:
    """(latents - mean) / std per channel, as `WanPipeline` undoes it before decoding."""
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return (latents - mean) / std
