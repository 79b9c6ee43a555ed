"""The miniature's world: clips are what their captions say, and the split is a split."""

import numpy as np
import pytest
import torch

from falloff.miniature import digits
from falloff.miniature.digits import DIRECTIONS


def scene(text: str, seed: int = 0) -> digits.Scene:
    return digits.draw_scene(np.random.default_rng(seed), text)


def test_a_seed_gives_the_same_clip() -> None:
    text = "a red 3 moving right and a blue 7 moving up"
    assert np.array_equal(digits.render(scene(text), 5), digits.render(scene(text), 5))


def test_parse_inverts_caption() -> None:
    text = "a red 3 moving right and a blue 7 moving up"
    assert digits.caption(digits.parse(text)) == text


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_digit_first_moves_as_captioned(direction: str) -> None:
    for seed in range(20):
        (mover,) = scene(f"a green 5 moving {direction}", seed)
        path = digits.track(mover, 13, 128)
        towards = (path[-1] - path[0]) @ np.array(DIRECTIONS[direction])
        assert towards == 12 * digits.SPEED


def test_digits_bounce_inside_the_canvas() -> None:
    for seed in range(20):
        (mover,) = scene("a cyan 1 moving left", seed)
        path = digits.track(mover, 200, 128)
        assert path.min() >= 0
        assert path.max() <= 128 - digits.GLYPH


def test_a_clip_shows_its_colour_on_a_dark_ground() -> None:
    clip = digits.render(scene("a yellow 8 moving down"), 3)
    assert clip.shape == (3, 128, 128, 3)
    assert clip[..., :2].max() > 0.9
    assert clip[..., 2].max() < 0.2
    assert np.median(clip) == pytest.approx(digits.BACKGROUND)


def test_two_digits_start_apart() -> None:
    for seed in range(10):
        movers = scene("a red 3 moving right and a blue 7 moving right", seed)
        assert digits._overlap(movers, 128) < 0.2 * digits.GLYPH**2


def test_scans_are_split() -> None:
    for digit in range(10):
        training, held = digits.training_scans(digit), digits.held_out_scans(digit)
        assert held
        assert not set(training) & set(held)
        assert set(digits.typical_scans(digit)) < set(training)
        assert all(digits.scans()[1][i] == digit for i in held)


def test_held_out_prompts_are_never_drawn_for_training() -> None:
    prompts = digits.held_out_prompts(64)
    assert len(set(prompts)) == 64
    assert all(digits.held_out(p) for p in prompts)
    rng = np.random.default_rng(0)
    drawn = {digits.draw_caption(rng, 1 + i % 2, heldout=False) for i in range(500)}
    assert not drawn & set(prompts)


def test_as_video_is_what_the_autoencoder_takes() -> None:
    video = digits.as_video(np.zeros((5, 16, 24, 3), dtype=np.float32))
    assert video.shape == (3, 5, 16, 24)
    assert torch.all(video == -1)
