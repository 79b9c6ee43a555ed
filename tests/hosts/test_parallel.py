"""Context parallelism: two processes compute what one does, and what cannot be right is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import ulysses
from diffusers import ContextParallelConfig, ParallelConfig
from families import FAMILIES, run
from torch import nn

import falloff
from falloff.hosts import UnsupportedModelError
from falloff.hosts.parallel import all_tokens, fault, whole_mask
from falloff.hosts.shards import Shards, shards_of


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """What went wrong in either process, by case: they start once, since that takes longer than all they do."""
    folder = tmp_path_factory.mktemp("ulysses")
    torch.multiprocessing.spawn(ulysses.work, args=(str(folder),), nprocs=ulysses.WORLD)
    told = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(ulysses.WORLD)]
    return {case: [faults[case] for faults in told if case in faults] for case in ulysses.CASES}


@pytest.mark.parametrize("case", ulysses.CASES)
def test_two_processes_compute_what_one_does(case: str, faults: dict[str, list[str]]) -> None:
    assert faults[case] == []


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("count", [2, 3])
def test_shares_are_joined_and_split_exactly(side: Any, count: int) -> None:
    text, grid = torch.arange(6), torch.arange(100, 112)
    whole = torch.cat([text, grid] if side == "before" else [grid, text])
    shares = [
        torch.cat([a, b] if side == "before" else [b, a])
        for a, b in zip(text.chunk(count), grid.chunk(count), strict=True)
    ]
    shards = shards_of(count, 18, 12, side)
    assert torch.equal(shards.joined(torch.cat(shares)[None])[0], whole)
    assert torch.equal(shards.split(whole[None])[0], torch.cat(shares))
    mask = torch.cat(shares)[None, None, None] % 3 == 0
    assert torch.equal(shards.joined_mask(mask)[0, 0, 0], whole % 3 == 0)


def test_no_text_is_in_order_already() -> None:
    assert torch.equal(shards_of(2, 12, 12, "before").joined(torch.arange(12)[None])[0], torch.arange(12))
    assert shards_of(2, 12, 12, "after") == Shards(2, 6)


def test_uneven_shares_are_refused() -> None:
    for tokens, grid in ((17, 12), (16, 11), (10, 12)):
        with pytest.raises(ValueError, match="that ulysses_degree divides"):
            shards_of(2, tokens, grid, "before")
    config = ContextParallelConfig(ulysses_degree=2)
    with pytest.raises(ValueError, match="3 heads have no even shares for 2 processes"):
        all_tokens(torch.zeros(1, 4, 3, 8), config)
    with pytest.raises(NotImplementedError, match="masks over keys alone"):
        whole_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), config)


KINDS = {
    "ring": (ContextParallelConfig(ring_degree=2), r"ring attention .*use ContextParallelConfig\(ulysses_degree=2\)"),
    "both": (ContextParallelConfig(ring_degree=2, ulysses_degree=2), r"ring attention .*ulysses_degree=4\)"),
    "ring anything": (ContextParallelConfig(ring_degree=2, ring_anything=True), "ring attention"),
    "anything": (
        ContextParallelConfig(ulysses_degree=2, ulysses_anything=True),
        "uneven shares .*sizes that divide evenly",
    ),
}


def set_config(model: nn.Module, config: ContextParallelConfig) -> None:
    """As ``enable_parallelism`` does, which needs an accelerator."""
    model._parallel_config = ParallelConfig(context_parallel_config=config)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = model._parallel_config


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_are_refused_before_and_after_enable(kind: str) -> None:
    config, reason = KINDS[kind]
    model = FAMILIES["Wan"].build()
    falloff.enable(model, tiny.Frames())
    set_config(model, config)
    with pytest.raises(UnsupportedModelError, match=f"WanTransformer3DModel under context parallelism: {reason}"):
        run(model, FAMILIES["Wan"].arguments((3, 4, 4)))
    falloff.disable(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        falloff.enable(model, tiny.Frames())
    assert not hasattr(model, "_falloff")
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_version_that_cannot_exchange_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("diffusers.models.attention_dispatch.SeqAllToAllDim")
    config = ContextParallelConfig(ulysses_degree=2)
    assert "has no exchange of tokens" in fault(config, dispatched=True, square_mask=False)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("Mochi", "does not exchange"), ("CogVideoX", "does not exchange"), ("HunyuanVideo 1.5", "mask")],
)
def test_families_that_diffusers_does_not_share_are_refused(name: str, reason: str) -> None:
    for first in (True, False):
        model = FAMILIES[name].build()
        if not first:
            falloff.enable(model, tiny.Frames())
        set_config(model, ContextParallelConfig(ulysses_degree=2))
        with pytest.raises(UnsupportedModelError, match=reason):
            falloff.enable(model, tiny.Frames()) if first else run(model, FAMILIES[name].arguments((3, 4, 4)))
