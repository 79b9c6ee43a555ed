"""Files laid out as the released ones become a pipeline."""

import argparse
from pathlib import Path

import pytest
import torch
from decoders import tokenizer

from falloff.decoding import LPDPipeline, convert
from falloff.decoding.tokenizer import VQTokenizer
from falloff.decoding.transformer import LPDTransformer


@pytest.fixture
def released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A small transformer and tokenizer as pickles, the tokenizer's widths being those of ours in the tests."""
    small = LPDTransformer(width=128, layers=2, heads=2, grid_height=3, grid_width=3, vocabulary=11, classes=5)
    settings = argparse.Namespace(batch=2)
    torch.save({"model": small.state_dict(), "epoch": 449, "args": settings}, tmp_path / "lpd.pth")
    vq = tokenizer()
    state = {**vq.state_dict(), "quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": state}, tmp_path / "vq.pt")
    shape = {key: vq.config[key] for key in ("width", "multipliers", "blocks", "latent_channels", "groups")}
    monkeypatch.setattr(convert, "VQTokenizer", lambda **sizes: VQTokenizer(**shape, **sizes))
    return tmp_path / "lpd.pth", tmp_path / "vq.pt"


def test_released_files_become_a_folder(released: tuple[Path, Path], tmp_path: Path) -> None:
    transformer, vq = released
    made = convert.convert(transformer, vq, tmp_path / "folder")
    assert list((tmp_path / "folder").rglob("*.safetensors"))
    again = LPDPipeline.from_pretrained(tmp_path / "folder")
    config = again.transformer.config
    assert (config.width, config.layers, config.heads, config.classes) == (128, 2, 2, 5)
    assert (config.grid_height, config.grid_width, config.vocabulary) == (3, 3, 11)
    assert torch.equal(
        again([1, 4], 5, generator=torch.Generator().manual_seed(0), output_type="latent").images,
        made([1, 4], 5, generator=torch.Generator().manual_seed(0), output_type="latent").images,
    )
    saved = torch.load(transformer, weights_only=False)["model"]
    assert all(torch.equal(saved[name], tensor) for name, tensor in again.transformer.state_dict().items())


def test_other_files_are_refused(released: tuple[Path, Path], tmp_path: Path) -> None:
    transformer, vq = released
    with pytest.raises(ValueError, match=r"vq.pt has no class_emb.weight; its first entries are encoder"):
        convert.load_transformer(vq)
    state = torch.load(transformer, weights_only=False)
    state["model"]["head.weight"] = torch.zeros(12, 128)
    torch.save(state, transformer)
    with pytest.raises(ValueError, match=r"lpd.pth does not fit LPDTransformer: [\s\S]*head.weight"):
        convert.load_transformer(transformer)
