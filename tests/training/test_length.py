"""RIFLEx: one temporal frequency lowered until its period covers the new length."""

import math

import pytest
import torch
from families import shared
from tiny import inputs, transformer

from falloff.training import TrainingError
from falloff.training.length import intrinsic, riflex


def test_the_intrinsic_component_has_the_period_nearest_to_the_trained_length() -> None:
    # 44 temporal channels of Wan 2.1: periods 2 pi 10000^(j / 22), of which 22.07 is nearest to 21 frames
    component, frequency = intrinsic(44, 21)
    assert component == 3
    assert 2 * math.pi / frequency == pytest.approx(2 * math.pi * 10000 ** (3 / 22))


def test_one_component_changes_and_comes_back() -> None:
    model = transformer()
    rope = model.rope
    cos, sin = rope.freqs_cos.clone(), rope.freqs_sin.clone()
    component, frequency = intrinsic(rope.t_dim, 5)
    dense = model(**inputs((20, 2, 2)), return_dict=False)[0]
    with riflex(model, 5, 20):
        changed = (rope.freqs_cos != cos).any(dim=0).nonzero().flatten().tolist()
        assert changed == [2 * component, 2 * component + 1]
        angle = math.atan2(rope.freqs_sin[1, 2 * component], rope.freqs_cos[1, 2 * component])
        assert angle == pytest.approx(0.9 * 2 * math.pi / 20)
        assert angle < frequency
        assert (model(**inputs((20, 2, 2)), return_dict=False)[0] - dense).abs().max() > 1e-5
    assert torch.equal(rope.freqs_cos, cos)
    assert torch.equal(rope.freqs_sin, sin)


def test_a_length_within_one_period_changes_nothing() -> None:
    model = transformer()
    before = model.rope.freqs_cos.clone()
    with riflex(model, 5, 3):
        torch.testing.assert_close(model.rope.freqs_cos, before, atol=1e-6, rtol=0)


def test_a_model_without_tables_is_refused() -> None:
    model = shared("Mochi")
    with pytest.raises(TrainingError, match="keeps no table of rotary positions"), riflex(model, 5, 20):
        pass
