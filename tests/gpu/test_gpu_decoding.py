"""Parallel decoding on this GPU: recorded steps and the masked training pass against plain ones."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "decoding"))

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@torch.no_grad()
def test_recorded_steps_decode_the_same_pictures() -> None:
    from decoders import SIZES, model, orders, sample

    from falloff.decoding.sampling import Guidance, Sampler
    from falloff.decoding.static import StaticSteps
    from falloff.decoding.steps import decode

    decoder = model().to("cuda")
    steps = StaticSteps(decoder, mode="reduce-overhead")
    for number in range(4):  # the first calls warm up and record
        labels = sample(2, number)[1].to("cuda")
        given = {"guidance": Guidance(scale=2.0), "sampler": Sampler(temperature=0)}
        ways = [decode(decoder, labels, orders(2, number), SIZES, compiled=way, **given) for way in (steps, None)]
        assert torch.equal(*ways)


def test_loss_under_blocks_is_the_loss_under_the_mask() -> None:
    from decoders import model, orders, sample

    from falloff.decoding import layout
    from falloff.decoding.training import decoding_loss

    decoder = model(torch.float32, width=128, heads=2).to("cuda")
    tokens, labels = (part.to("cuda") for part in sample(3))
    sizes = [(1, 14), (1, 2, 3, 4, 5), (1,) * 15]
    loss = decoding_loss(decoder, tokens, labels, orders(3).to("cuda"), sizes)
    torch.autograd.backward(loss)
    assert decoder.pos_embed.grad is not None
    ids = layout.group_ids(sizes, 15).to("cuda")
    placed = tokens.gather(1, orders(3).to("cuda"))
    with torch.no_grad():
        attend = layout.attending(layout.dense_mask(ids, 16))
        logits = decoder(labels, placed, orders(3).to("cuda"), orders(3).to("cuda"), attend)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), placed.flatten())
    torch.testing.assert_close(loss.detach(), expected, rtol=2e-2, atol=2e-2)  # autocast to bfloat16 against float32
