"""The miniature's transformer: 16 x 16 tokens of a digit of the asked class."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch

from falloff.decoding.tokenizer import VQTokenizer
from falloff.decoding.training import Codes, Recipe, train
from falloff.decoding.transformer import LPDTransformer
from falloff.miniature.digits import training_scans
from falloff.miniature.images.pictures import SIDE, TOKEN, pictures
from falloff.miniature.images.tokenizer import CODES, encode
from falloff.miniature.muon import optimizers
from falloff.training_state import seeded

RECIPE = Recipe(batch=8, warmup=0.02, decay=0.6, floor=0.02, clip=1.0)


def build() -> LPDTransformer:
    """The untrained transformer (about 1.3 M parameters)."""
    side = SIDE // TOKEN
    model: LPDTransformer = LPDTransformer(
        width=128, layers=6, heads=4, grid_height=side, grid_width=side, vocabulary=CODES, classes=10, dropout=0.0
    )
    return model


def load_codes(tokenizer: VQTokenizer, folder: Path) -> Codes:
    """Tokens of all training scans, from ``folder``/codes.pt, made there first if it is missing."""
    file = folder / "codes.pt"
    if not file.exists():
        images, labels = pictures(training_scans)
        beside = file.with_suffix(".part")
        torch.save((encode(tokenizer, images), labels), beside)
        os.replace(beside, file)
    return Codes(*torch.load(file, weights_only=True))


def train_transformer(
    tokenizer: VQTokenizer,
    folder: Path,
    seconds: float,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> LPDTransformer:
    """Train for ``seconds`` in all, going on from ``folder``/decoder.pt."""
    model = seeded(build)
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    both = optimizers(matrices, model, rates=(0.02, 2e-3))
    train(model, load_codes(tokenizer, folder), folder, RECIPE, both, seconds=seconds, on_step=on_step)
    return model
