"""Released checkpoints, which are pickles, as a pipeline folder of safetensors.

    python -m falloff.decoding.convert lpd_l_256.pth vq_ds16_c2i.pt lpd-l-256

Pickles are read with ``weights_only``: nothing in them is run.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor

from falloff.decoding.pipeline import LPDPipeline
from falloff.decoding.tokenizer import VQTokenizer
from falloff.decoding.transformer import LPDTransformer

HEAD = 64
"""Channels per head of all released models."""
TRAINING_ONLY = ("quantize.codebook_used",)
"""A tensor of the released tokenizer that says which codes were used last."""


def convert(transformer: Path, tokenizer: Path, folder: Path) -> LPDPipeline:
    """Write the pipeline to ``folder`` and return it. Raises ``ValueError`` for files that hold something else."""
    pipe = LPDPipeline(transformer=load_transformer(transformer), vae=load_tokenizer(tokenizer))
    pipe.save_pretrained(folder)
    return pipe


def load_transformer(file: Path) -> LPDTransformer:
    """The model of a released file; all sizes are read off its weights."""
    state = _state(file, needed="class_emb.weight")
    classes, width = state["class_emb.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1] - 1)
    model = LPDTransformer(
        width=width,
        layers=sum(name.endswith("attn.qkv.weight") for name in state),
        heads=max(1, width // HEAD),
        grid_height=side,
        grid_width=side,
        vocabulary=state["token_emb.weight"].shape[0],
        classes=classes,
    )
    _fill(model, state, file)
    return model.eval()  # type: ignore[no-any-return]  # diffusers is not typed


def load_tokenizer(file: Path) -> VQTokenizer:
    """The tokenizer of a released file."""
    state = _state(file, needed="quantize.embedding.weight")
    codes, dim = state["quantize.embedding.weight"].shape
    model = VQTokenizer(codes=codes, code_dim=dim)
    _fill(model, {name: tensor for name, tensor in state.items() if name not in TRAINING_ONLY}, file)
    return model.eval()  # type: ignore[no-any-return]  # diffusers is not typed


def _state(file: Path, needed: str) -> dict[str, Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):  # the settings it was trained with
        content = torch.load(file, map_location="cpu", weights_only=True)
    state: dict[str, Tensor] = content.get("model", content)
    if needed not in state:
        raise ValueError(f"{file} has no {needed}; its first entries are {', '.join(list(state)[:4])}")
    return state


def _fill(model: torch.nn.Module, state: dict[str, Tensor], file: Path) -> None:
    """Sizes that differ are an error of ``load_state_dict`` that names them."""
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{file} does not fit {type(model).__name__}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m falloff.decoding.convert", description=__doc__)
    parser.add_argument("transformer", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("folder", type=Path)
    convert(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
