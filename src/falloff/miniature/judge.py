"""Does a video show what its prompt asks? A judge for the miniature's world.

Pixels that are bright are given to the nearest palette colour; each colour's pixels are cropped around their
centroid in several frames, and a small classifier, trained on the real scans, reads the digit by majority.
The direction is where the centroid goes over the first frames. `measure` prints how often the judge is right
on rendered clips of held-out handwriting, and on their reconstructions: the ceiling of any prompt score.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from falloff.miniature import digits
from falloff.miniature.digits import COLOURS, GLYPH, Floats, Wish
from falloff.training_state import seeded

BRIGHT = 0.35  # a pixel whose strongest channel is above this belongs to a digit
FEWEST = 60  # px: less of a colour than this in a frame is not a digit (the thinnest 1 has about 250)
FRAMES_READ = 7
MOTION_FRAMES = 13
PATCH = 24  # px: what the classifier sees, a crop of GLYPH + 16 px at 3/8 of its size
CROP = GLYPH + 16


@dataclass(frozen=True)
class Verdict:
    """For one asked digit: was the digit seen at all, in the asked colour, and moving the asked way."""

    found: bool
    colour: bool
    direction: bool


def build_classifier() -> torch.nn.Module:
    """[batch, 1, PATCH, PATCH] opacity to ten logits (about 50 k parameters)."""
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 24, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(24, 48, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Conv2d(48, 64, 3, padding=1),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Flatten(),
        torch.nn.Linear(64 * 9, 10),
    )


def train_classifier(file: Path, steps: int = 1500) -> torch.nn.Module:
    """The classifier from `file`, trained there first from a fixed seed if it is missing."""
    model = seeded(build_classifier)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model.eval()
    rng = np.random.default_rng(8)
    indices = np.array([i for d in range(10) for i in digits.training_scans(d)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        chosen = rng.choice(indices, size=64)
        patches = torch.from_numpy(np.stack([_augmented(rng, int(i)) for i in chosen]))[:, None]
        loss = torch.nn.functional.cross_entropy(model(patches), torch.from_numpy(digits.scans()[1][chosen]))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    save_file(model.state_dict(), file)
    return model.eval()


def _augmented(rng: np.random.Generator, scan: int) -> Floats:
    """A scan as a crop of the judge would show it: off centre, softened, thinner or thicker, perhaps cut."""
    canvas = np.zeros((CROP + 8, CROP + 8), dtype=np.float32)
    canvas[12 : 12 + GLYPH, 12 : 12 + GLYPH] = digits.scans()[0][scan]
    rows, columns = np.nonzero(canvas > 0.5)
    dy, dx = rng.integers(-4, 5, size=2)
    patch = crop(canvas, int(rows.mean()) + int(dy), int(columns.mean()) + int(dx))
    patch = np.clip((patch - rng.uniform(-0.2, 0.25)) * rng.uniform(0.8, 2.0), 0, 1)
    if rng.random() < 0.15:  # another digit in front of an edge
        patch[:, : int(rng.integers(1, 6))] = 0
    return np.asarray(patch + rng.normal(0, 0.05, patch.shape), dtype=np.float32)


def crop(opacity: Floats, row: int, column: int) -> Floats:
    """CROP x CROP px around (row, column) of an [H, W] picture, empty outside, as [PATCH, PATCH]."""
    half = CROP // 2
    padded = np.pad(opacity, half)[row : row + CROP, column : column + CROP]
    whole = torch.from_numpy(padded)[None, None]
    small = torch.nn.functional.interpolate(whole, size=(PATCH, PATCH), mode="area")[0, 0]
    return np.asarray(small.numpy(), dtype=np.float32)


def segment(clip: Floats) -> dict[str, NDArray[np.bool_]]:
    """Per palette colour, where it is in the clip [F, H, W, 3]: [F, H, W]."""
    hue = clip / np.maximum(clip.max(axis=-1, keepdims=True), 1e-3)
    palette = np.array([np.array(c) / max(c) for c in COLOURS.values()], dtype=np.float32)
    nearest = np.square(hue[..., None, :] - palette).sum(axis=-1).argmin(axis=-1)
    bright = clip.max(axis=-1) > BRIGHT
    return {name: bright & (nearest == i) for i, name in enumerate(COLOURS)}


def read(classifier: torch.nn.Module, clip: Floats, mask: NDArray[np.bool_]) -> int | None:
    """The digit that a colour's pixels show in most of the frames read, or None where there is none."""
    strength = clip.max(axis=-1) * mask
    frames = np.linspace(0, len(clip) - 1, FRAMES_READ).astype(int)
    patches = []
    for f in frames:
        rows, columns = np.nonzero(mask[f])
        if len(rows) >= FEWEST:
            patches.append(crop(strength[f], int(rows.mean()), int(columns.mean())))
    if len(patches) < FRAMES_READ // 2 + 1:
        return None
    with torch.no_grad():
        votes = classifier(torch.from_numpy(np.stack(patches))[:, None]).argmax(dim=1).tolist()
    digit, count = Counter(votes).most_common(1)[0]
    return int(digit) if 2 * count > FRAMES_READ else None


def heading(mask: NDArray[np.bool_]) -> str | None:
    """Where the centroid of a colour's pixels goes over the first frames."""
    centres = [np.argwhere(m).mean(axis=0) for m in mask[:MOTION_FRAMES] if m.sum() >= FEWEST]
    if len(centres) < 3:
        return None
    dy, dx = centres[-1] - centres[0]
    if max(abs(dx), abs(dy)) < 3:
        return None
    if abs(dx) > abs(dy):
        return "right" if dx > 0 else "left"
    return "down" if dy > 0 else "up"


def judge(classifier: torch.nn.Module, clip: Floats, prompt: str) -> list[Verdict]:
    """A verdict per digit that the prompt asks for; `clip` is [F, H, W, 3] in [0, 1]."""
    masks = {name: mask for name, mask in segment(clip).items() if mask.sum() >= FEWEST * FRAMES_READ}
    seen = {name: (read(classifier, clip, mask), heading(mask)) for name, mask in masks.items()}
    return [_verdict(wish, seen) for wish in digits.parse(prompt)]


def _verdict(wish: Wish, seen: dict[str, tuple[int | None, str | None]]) -> Verdict:
    """Found counts a digit of any colour. If found, it must itself have the asked colour for `colour`;
    if not, the asked colour must be there. The direction is that of the asked colour, else of the digit."""
    holders = [name for name, (digit, _) in seen.items() if digit == wish.digit]
    subject = wish.colour if wish.colour in seen else next(iter(holders), None)
    moves = seen[subject][1] if subject is not None else None
    coloured = wish.colour in (holders or seen)
    return Verdict(bool(holders), coloured, moves == wish.direction)
