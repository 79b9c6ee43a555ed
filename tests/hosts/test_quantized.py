"""torchao's low-bit weights under sparse attention: the linears are theirs, the attention is ours."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, run
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

import falloff

KINDS = {"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}


def quantized(name: str, kind: str) -> nn.Module:
    model = FAMILIES[name].build()
    quantize_(model, KINDS[kind]())
    return model


def given(name: str) -> dict[str, Any]:
    return FAMILIES[name].arguments((1, 4, 5) if FAMILIES[name].image else (3, 4, 5), 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["HunyuanVideo", "CogVideoX", "FLUX.1", "Wan"])
def test_weights_quantized_before_and_after_enable(name: str, kind: str) -> None:
    family, method = FAMILIES[name], tiny.Frames(rows=FAMILIES[name].image)
    exact = run(falloff.enable(family.build(), method), given(name))
    before = falloff.enable(quantized(name, kind), method)
    after = falloff.enable(family.build(), method)
    quantize_(after, KINDS[kind]())
    sparse = run(before, given(name))
    assert torch.equal(run(after, given(name)), sparse)
    assert 0 < (sparse - exact).abs().max() < 0.2  # low bits did change the numbers, and by no more than low bits do
    for model in (before, after):
        report = falloff.report(model)
        assert (sorted(call.layer for call in report.calls), report.reasons) == (list(range(family.layers)), {})
        falloff.disable(model)
        dense = run(model, given(name))
        assert torch.equal(dense, run(quantized(name, kind), given(name)))
        assert (dense - sparse).abs().max() > 1e-3
