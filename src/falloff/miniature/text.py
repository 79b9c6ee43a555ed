"""The miniature's text side: a tokenizer that knows the captions' words, and a tiny UMT5 encoder.

As the large encoders do, it learns from text alone what belongs together: each word of "a red 3 moving right" is
taught to say all of its part of the caption. In training on videos alone its words hardly learn that, and videos of
two digits mix them up.
"""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import torch
from rich.progress import track
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from falloff.miniature.digits import COLOURS, DIRECTIONS, draw_caption, parse
from falloff.training_state import seeded

WIDTH = 64
LENGTH = 32  # tokens; a caption for two digits takes 12 with its end mark
SPECIAL = ("<pad>", "</s>", "<unk>")
PART = 5  # words of "a red 3 moving right"; "and" stands before the next part
SIZES = (len(COLOURS), 10, len(DIRECTIONS))  # what a word of a part can say, and how many of each there are
WORDS = ("a", "and", "moving", *(str(d) for d in range(10)), *COLOURS, *DIRECTIONS)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Word-level; ends every text with `</s>`, as UMT5's own tokenizer does."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
        padding_side="right",
    )


def build_encoder() -> UMT5EncoderModel:
    """The untrained encoder (about 0.1 M parameters)."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=64,
            d_model=WIDTH,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )


def embed(encoder: UMT5EncoderModel, texts: list[str]) -> torch.Tensor:
    """[batch, LENGTH, WIDTH], zero past each text's end: what `WanPipeline` feeds its transformer."""
    inputs = tokenizer()(texts, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")
    states: torch.Tensor = encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    mask: torch.Tensor = inputs.attention_mask
    return states * mask[..., None]


def teach(encoder: UMT5EncoderModel, steps: int = 1000, batch: int = 64) -> None:
    """Train every word's state to tell colour, digit and direction of its part, and to stay what it was else."""
    before = copy.deepcopy(encoder)
    tell = seeded(lambda: torch.nn.Linear(WIDTH, sum(SIZES)))
    optimizer = torch.optim.Adam([*encoder.parameters(), *tell.parameters()], lr=2e-3)
    rng = np.random.default_rng(8)
    for step in track(range(steps), description="captions"):
        captions = [draw_caption(rng, 1 + i % 2, heldout=False) for i in range(batch)]
        states = embed(encoder, captions)
        with torch.no_grad():
            kept = embed(before, captions)
        loss = told(tell(states), captions) + 2 * (states - kept).square().sum() / kept.square().sum()
        optimizer.param_groups[0]["lr"] = 2e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()


def told(answers: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Cross entropy of what the words say, [batch, LENGTH, sum(SIZES)], of their parts' three properties."""
    wanted, asked = [], []
    for i, caption in enumerate(captions):
        for part, wish in enumerate(parse(caption)):
            wanted += [(list(COLOURS).index(wish.colour), wish.digit, list(DIRECTIONS).index(wish.direction))] * PART
            asked += [(i, part * (PART + 1) + word) for word in range(PART)]
    rows, words = torch.tensor(asked).unbind(1)
    each = answers[rows, words].split(SIZES, dim=-1)  # type: ignore[no-untyped-call]  # torch's own, without a type
    losses = map(torch.nn.functional.cross_entropy, each, torch.tensor(wanted).unbind(1))
    return torch.stack(list(losses)).sum()
