"""The miniature's world: coloured handwritten digits that move at one speed and bounce off the walls.

A `Scene` says everything about a clip (which scans, colours, places); `render` draws it. Digits start on a
grid of the autoencoder's 8 px and move 8 px per latent frame: what the transformer has to learn is then what
digits look like and where they go, not how the autoencoder writes a shift by a part of a token. The
digits are the real 8x8 scans bundled with scikit-learn, upscaled smoothly. Scans and captions are both split
into training and held-out parts, so that a prompt and a handwriting can each be new to the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits

Floats = NDArray[np.float32]

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.15, 0.15, 1.0),
    "yellow": (1.0, 1.0, 0.1),
    "cyan": (0.1, 1.0, 1.0),
    "magenta": (1.0, 0.1, 1.0),
}
# (dx, dy) in pixels, y pointing down.
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
BACKGROUND = 0.03
GLYPH = 48  # px: the side of an upscaled scan
TYPICAL = 6
GRID = 8  # px: the side of a token
SPEED = 2  # px per frame: one token per latent frame of 4
HELD_OUT_SHARE = 10  # percent, of scans and of captions


@dataclass(frozen=True)
class Mover:
    """One digit of a scene: what is asked in words, and the draw (scan, place in px)."""

    digit: int
    colour: str
    direction: str
    scan: int
    x: int
    y: int


Scene = tuple[Mover, ...]
Choice = Callable[[int], tuple[int, ...]]  # which scans to draw a digit from


@dataclass(frozen=True)
class Wish:
    """What a caption asks of one digit."""

    digit: int
    colour: str
    direction: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.digit} moving {self.direction}"


def caption(wishes: tuple[Wish | Mover, ...]) -> str:
    """`"a red 3 moving right and a blue 7 moving up"`."""
    return " and ".join(str(Wish(w.digit, w.colour, w.direction)) for w in wishes)


def parse(text: str) -> tuple[Wish, ...]:
    """The inverse of `caption`."""
    wishes = []
    for part in text.split(" and "):
        _, colour, digit, _, direction = part.split(" ")
        wishes.append(Wish(int(digit), colour, direction))
    return tuple(wishes)


def held_out(name: str) -> bool:
    """Whether a caption (or a scan's name) is kept from training: a hash, the same on every machine."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % 100 < HELD_OUT_SHARE


@cache
def scans() -> tuple[Floats, NDArray[np.int64]]:
    """All scans as opacity in [0, 1], [1797, GLYPH, GLYPH], and their digits, [1797]."""
    data = load_digits()
    small = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    large = torch.nn.functional.interpolate(small, size=(GLYPH, GLYPH), mode="bicubic", align_corners=False)
    # A soft threshold turns the blurred 8x8 grey levels into strokes with smooth edges.
    return torch.sigmoid((large[:, 0] - 0.45) * 12).numpy(), data.target.astype(np.int64)


@cache
def training_scans(digit: int) -> tuple[int, ...]:
    """The indices of the scans of `digit` that may be trained on."""
    return tuple(i for i in _scans_of(digit) if not held_out(f"scan {i}"))


@cache
def held_out_scans(digit: int) -> tuple[int, ...]:
    """The indices of the scans of `digit` that are kept for measuring."""
    return tuple(i for i in _scans_of(digit) if held_out(f"scan {i}"))


def _scans_of(digit: int) -> list[int]:
    return [int(i) for i in np.flatnonzero(scans()[1] == digit)]


@cache
def typical_scans(digit: int) -> tuple[int, ...]:
    """The training scans of `digit` nearest to their mean: what the transformer learns to draw.

    A model this small, trained this briefly, draws a few clear handwritings better than a hundred and sixty.
    """
    chosen = np.array(training_scans(digit))
    glyphs = scans()[0][chosen]
    distances = np.square(glyphs - glyphs.mean(axis=0)).sum(axis=(1, 2))
    return tuple(int(i) for i in chosen[np.argsort(distances)[:TYPICAL]])


def draw_wishes(rng: np.random.Generator, count: int) -> tuple[Wish, ...]:
    """`count` random wishes, of different colours."""
    colours = rng.choice(list(COLOURS), size=count, replace=False)
    return tuple(Wish(int(rng.integers(10)), str(c), str(rng.choice(list(DIRECTIONS)))) for c in colours)


def draw_caption(rng: np.random.Generator, count: int, heldout: bool) -> str:
    """A random caption for `count` digits from the training or the held-out part."""
    while True:
        text = caption(draw_wishes(rng, count))
        if held_out(text) == heldout:
            return text


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` different held-out captions, of one and two digits in turn until those of one run out."""
    rng = np.random.default_rng(seed)
    singles = sorted({t for t in _all_single_captions() if held_out(t)})
    rng.shuffle(singles)
    prompts: list[str] = []
    while len(prompts) < count:
        text = singles.pop() if len(prompts) % 2 == 0 and singles else draw_caption(rng, 2, heldout=True)
        if text not in prompts:
            prompts.append(text)
    return prompts


def _all_single_captions() -> Iterator[str]:
    for digit in range(10):
        for colour in COLOURS:
            for direction in DIRECTIONS:
                yield caption((Wish(digit, colour, direction),))


def draw_scene(rng: np.random.Generator, text: str, choose: Choice = typical_scans, size: int = 128) -> Scene:
    """A scene that fits the caption on a canvas of `size` px: of 16 draws the one that overlaps least.

    `choose` is one of `typical_scans`, `training_scans` and `held_out_scans`.
    """
    wishes = parse(text)
    count = 16 if len(wishes) > 1 else 1
    draws = [tuple(_draw_mover(rng, w, choose, size) for w in wishes) for _ in range(count)]
    return min(draws, key=lambda scene: _overlap(scene, size))


def _draw_mover(rng: np.random.Generator, wish: Wish, choose: Choice, size: int) -> Mover:
    cells = (size - GLYPH) // GRID
    dx, dy = DIRECTIONS[wish.direction]
    # Start in the first 40 % of the way ahead, so that the asked direction is seen before a bounce.
    along, across = int(rng.integers(cells * 2 // 5 + 1)), int(rng.integers(cells + 1))
    if dx + dy < 0:
        along = cells - along
    x, y = (along, across) if dx else (across, along)
    scan = int(rng.choice(choose(wish.digit)))
    return Mover(wish.digit, wish.colour, wish.direction, scan, x * GRID, y * GRID)


def _overlap(scene: Scene, size: int, frames: int = 32) -> float:
    """Mean shared area of the digits' squares over the first frames, in px^2."""
    tracks = [track(m, frames, size) for m in scene]
    area = 0.0
    for i, a in enumerate(tracks):
        for b in tracks[i + 1 :]:
            area += float(np.clip(GLYPH - np.abs(a - b), 0, None).prod(axis=1).mean())
    return area


def track(mover: Mover, frames: int, size: int) -> NDArray[np.int64]:
    """The top-left corner of a digit in every frame, [frames, (x, y)], reflected at the walls."""
    free = size - GLYPH
    dx, dy = DIRECTIONS[mover.direction]
    steps = np.arange(frames) * SPEED
    path = np.stack([mover.x + dx * steps, mover.y + dy * steps], axis=1)
    return np.asarray(free - np.abs(free - path % (2 * free)))


def render(scene: Scene, frames: int, size: int = 128) -> Floats:
    """The clip, [frames, size, size, 3] in [0, 1]; a later digit covers an earlier one."""
    clip = np.full((frames, size, size, 3), BACKGROUND, dtype=np.float32)
    for mover in scene:
        opacity = scans()[0][mover.scan][..., None]
        colour = np.asarray(COLOURS[mover.colour], dtype=np.float32)
        for frame, (x, y) in zip(clip, track(mover, frames, size), strict=True):
            view = frame[y : y + GLYPH, x : x + GLYPH]
            view += opacity * (colour - view)
    return clip


def as_video(clip: Floats) -> torch.Tensor:
    """[F, H, W, 3] in [0, 1] to the autoencoder's [3, F, H, W] in [-1, 1]."""
    return torch.from_numpy(clip).permute(3, 0, 1, 2) * 2 - 1
