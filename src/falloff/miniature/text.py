"""The miniature's text side: a tokenizer that knows the captions' words, and a tiny UMT5 encoder."""

from __future__ import annotations

from functools import cache

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from falloff.miniature.digits import COLOURS, DIRECTIONS

WIDTH = 64
LENGTH = 32  # tokens; a caption for two digits takes 12 with its end mark
SPECIAL = ("<pad>", "</s>", "<unk>")
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
