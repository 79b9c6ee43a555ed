"""What the text encoder learns from captions alone."""

from __future__ import annotations

import numpy as np
import torch
from transformers import UMT5EncoderModel

from falloff import miniature
from falloff.miniature import digits, text
from falloff.training_state import seeded

PAIR = ["a red 3 moving right and a blue 7 moving up"]


def captions_of(seed: int, count: int, *, heldout: bool) -> list[str]:
    rng = np.random.default_rng(seed)
    return [digits.draw_caption(rng, 2, heldout=heldout) for _ in range(count)]


@torch.no_grad()
def colour_words_that_tell_their_digit(encoder: UMT5EncoderModel) -> float:
    """Of held-out captions, by least squares from the state of the second part's colour."""
    known, asked = captions_of(0, 600, heldout=False), captions_of(1, 200, heldout=True)
    before, after = (text.embed(encoder, captions)[:, text.PART + 2] for captions in (known, asked))
    digit = torch.tensor([digits.parse(caption)[1].digit for caption in known])
    before, after = (torch.nn.functional.pad(x, (0, 1), value=1.0) for x in (before, after))
    weights = torch.linalg.lstsq(before, torch.nn.functional.one_hot(digit, 10).float(), driver="gelsd").solution
    told = (after @ weights).argmax(1)
    return float(np.mean([digits.parse(c)[1].digit == int(t) for c, t in zip(asked, told, strict=True)]))


def test_a_word_is_asked_about_its_own_part() -> None:
    answers = torch.zeros(1, text.LENGTH, sum(text.SIZES))
    red, blue = list(digits.COLOURS).index("red"), list(digits.COLOURS).index("blue")
    right, up = (list(digits.DIRECTIONS).index(d) for d in ("right", "up"))
    for words, said in (((0, 5), (red, 6 + 3, 16 + right)), ((6, 11), (blue, 6 + 7, 16 + up))):
        for place in said:
            answers[0, slice(*words), place] = 20.0
    assert text.told(answers, PAIR) < 1e-5
    assert text.told(answers.roll(text.PART + 1, dims=1), PAIR) > 1


def test_words_learn_what_they_belong_to() -> None:
    encoder = seeded(text.build_encoder)
    before = colour_words_that_tell_their_digit(encoder)
    text.teach(encoder, steps=100, batch=16)
    assert colour_words_that_tell_their_digit(encoder) > before + 0.15


def test_the_shipped_encoder_knows_what_words_belong_to() -> None:
    encoder = UMT5EncoderModel.from_pretrained(miniature.path() / "text_encoder", dtype=torch.float32)
    assert colour_words_that_tell_their_digit(encoder) > 0.95
