"""The image miniature's data and training, a few steps of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from falloff.decoding import LPDPipeline
from falloff.decoding.training import Codes
from falloff.miniature.digits import held_out_scans, training_scans
from falloff.miniature.images import tokenizer, transformer
from falloff.miniature.images.__main__ import save
from falloff.miniature.images.pictures import SIDE, TOKEN, pictures
from falloff.miniature.muon import optimizers
from falloff.training_state import seeded


def test_pictures_show_digits_in_the_middle() -> None:
    images, labels = pictures(held_out_scans)
    assert images.shape == (len(labels), 1, SIDE, SIDE)
    assert sorted(set(labels.tolist())) == list(range(10))
    assert float(images.min()) == -1
    assert 0.9 < float(images.max()) <= 1
    edges = torch.cat([images[..., :8].flatten(), images[..., :8, :].flatten()])
    assert (edges == -1).all()
    assert len(images) + len(pictures(training_scans)[0]) == 1797


def test_tokenizer_learns_and_unused_codes_are_set_anew() -> None:
    model = seeded(tokenizer.build)
    both = optimizers((p for p in model.parameters() if p.ndim == 4 and len(p) > 3), model, rates=(0.03, 3e-3))
    images = pictures(held_out_scans)[0][:4]
    first, codes, latents = tokenizer._step(model, both.values(), images)
    assert codes.shape == (4, SIDE // TOKEN, SIDE // TOKEN)
    for _ in range(8):
        last, codes, latents = tokenizer._step(model, both.values(), images)
    assert last < 0.5 * first
    used = torch.bincount(codes.flatten(), minlength=tokenizer.CODES)
    assert (used == 0).any()
    before = model.quantize.embedding.weight.clone()
    tokenizer._reseed(model, used, latents, np.random.default_rng(0))
    after = model.quantize.embedding.weight
    assert torch.equal(before[used > 0], after[used > 0])
    directions = latents.movedim(1, -1).flatten(0, 2)
    assert float((after[used == 0] @ directions.T).amax(dim=1).min().detach()) == pytest.approx(1, abs=1e-5)


def test_training_goes_on_where_it_was_and_makes_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = torch.randint(tokenizer.CODES, (4, 256), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(transformer, "load_codes", lambda vae, folder: Codes(tokens.to(torch.uint8), torch.arange(4)))
    vae = seeded(tokenizer.build)
    steps: list[int] = []
    for seconds in (0.01, 0.02):  # each a step: the second goes on from the first
        file = tmp_path / "decoder.pt"
        if file.exists():
            state = torch.load(file, weights_only=True)
            torch.save({**state, "spent": 0.01}, file)
        model = transformer.train_transformer(vae, tmp_path, seconds, on_step=lambda step, loss: steps.append(step))
    assert steps == [1, 2]
    save(LPDPipeline(model, vae), tmp_path / "checkpoint")
    pipe = LPDPipeline.from_pretrained(tmp_path / "checkpoint", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((tmp_path / "checkpoint" / "generation.json").read_text())
    assert pipe(7, **call).images[0].size == (SIDE, SIDE)
    size = sum(f.stat().st_size for f in (tmp_path / "checkpoint").rglob("*") if f.is_file())
    assert size < 8 * 2**20


def test_codes_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = pictures(held_out_scans)
    monkeypatch.setattr(transformer, "pictures", lambda choose: (images[:3], labels[:3]))
    vae = seeded(tokenizer.build).eval()
    made = transformer.load_codes(vae, tmp_path)
    assert torch.equal(made.tokens_MN, vae.encode(images[:3]).flatten(1))
    assert torch.equal(made.labels_M, labels[:3])
    monkeypatch.setattr(transformer, "pictures", None)
    assert torch.equal(transformer.load_codes(vae, tmp_path).tokens_MN, made.tokens_MN)
