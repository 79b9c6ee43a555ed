"""The judge, on clips that are right or wrong by construction."""

from pathlib import Path

import numpy as np
import pytest
import torch

from falloff.miniature import digits, judge


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    return judge.train_classifier(Path(tmp_path_factory.mktemp("judge")) / "judge.safetensors", steps=300)


def clip_of(text: str, seed: int) -> digits.Floats:
    return digits.render(digits.draw_scene(np.random.default_rng(seed), text), 17)


def test_right_clips_are_judged_right(classifier: torch.nn.Module) -> None:
    texts = digits.held_out_prompts(16)
    verdicts = [v for i, t in enumerate(texts) for v in judge.judge(classifier, clip_of(t, i), t)]
    assert np.mean([v.found for v in verdicts]) >= 0.9
    assert np.mean([v.colour for v in verdicts]) >= 0.9
    assert np.mean([v.direction for v in verdicts]) >= 0.9


def test_a_wrong_colour_is_seen(classifier: torch.nn.Module) -> None:
    (verdict,) = judge.judge(classifier, clip_of("a red 0 moving up", 1), "a blue 0 moving up")
    assert verdict == judge.Verdict(found=True, colour=False, direction=True)


def test_a_wrong_direction_is_seen(classifier: torch.nn.Module) -> None:
    (verdict,) = judge.judge(classifier, clip_of("a red 0 moving up", 1), "a red 0 moving down")
    assert verdict == judge.Verdict(found=True, colour=True, direction=False)


def test_swapped_colours_are_seen(classifier: torch.nn.Module) -> None:
    clip = clip_of("a red 0 moving up and a green 4 moving up", 2)
    verdicts = judge.judge(classifier, clip, "a green 0 moving up and a red 4 moving up")
    assert [v.found for v in verdicts] == [True, True]
    assert [v.colour for v in verdicts] == [False, False]


def test_nothing_is_found_in_an_empty_clip(classifier: torch.nn.Module) -> None:
    (verdict,) = judge.judge(classifier, digits.render((), 17), "a red 0 moving up")
    assert verdict == judge.Verdict(found=False, colour=False, direction=False)
