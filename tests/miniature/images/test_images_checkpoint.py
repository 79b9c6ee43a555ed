"""The shipped image miniature: small, whole, and the same picture under a seed."""

import json

import numpy as np
import torch

from falloff.decoding import LPDPipeline
from falloff.miniature import images


def test_is_small_and_names_no_path_of_the_machine_it_was_made_on() -> None:
    assert sum(f.stat().st_size for f in images.path().rglob("*") if f.is_file()) <= 8 * 2**20
    for file in images.path().rglob("*.json"):
        assert "_name_or_path" not in file.read_text()


def test_decodes_the_same_digit_under_a_seed() -> None:
    pipe = LPDPipeline.from_pretrained(images.path(), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = json.loads((images.path() / "generation.json").read_text())
    first, again = (pipe(3, generator=torch.Generator().manual_seed(0), output_type="np", **call).images for _ in "ab")
    assert first.shape == (1, 64, 64, 1)
    assert np.array_equal(first, again)
    assert 0.02 < first.mean() < 0.5
