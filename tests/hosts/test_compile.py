"""The seam under torch.compile, with full graphs: numbers, slots, grids, and no more frames than without us."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, run
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import falloff
from falloff import Grid
from falloff.hosts import op
from falloff.hosts.diffusers import DetachedError

MODES = ["regional", "whole"]


@pytest.fixture(autouse=True)
def fresh() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, mode: str, backend: Any) -> Any:
    if mode == "regional":
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
        return model
    return torch.compile(model, backend=backend, fullgraph=True)


def forward(model: Any, timestep: int = 500, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**{**tiny.inputs(**more), "timestep": torch.tensor([timestep])}, return_dict=False)[0]
    return out


@pytest.mark.parametrize("mode", MODES)
def test_compiled_equals_eager(mode: str) -> None:
    model = tiny.transformer()
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    sparse = forward(model)
    model = compiled(model, mode, "aot_eager")
    torch.testing.assert_close(forward(model), sparse, atol=1e-6, rtol=1e-6)
    falloff.enable(model, "dense", replace=True)
    torch.testing.assert_close(forward(model), plain, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_every_layer_of_every_step_in_one_frame(mode: str) -> None:
    model, counter = tiny.transformer(layers=12), CompileCounterWithBackend("eager")
    falloff.enable(model, tiny.Frames(), timing=True)
    target = compiled(model, mode, counter)
    for timestep in (900, 500, 100):
        forward(target, timestep)
    calls = falloff.report(model).calls
    assert [(call.step, call.layer) for call in calls] == [(step, layer) for step in range(3) for layer in range(12)]
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("mode", "frames"), [("regional", [1, 1, 2, 2, 2]), ("whole", [1, 1, 2, 3, 3]), ("eager", [0] * 5)]
)
@pytest.mark.parametrize("enabled", [False, True])
def test_sizes_reach_the_operator_without_more_frames(
    mode: str, frames: list[int], enabled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, counter = tiny.transformer(layers=1 if mode == "whole" else 2), CompileCounterWithBackend("eager")
    if enabled:
        falloff.enable(model, tiny.Frames())
    target = model if mode == "eager" else compiled(model, mode, counter)
    fits: list[bool] = []
    inner = op._called

    def checked(query: Tensor, key: Tensor, value: Tensor, mask: Any, slot: Any, grid: Grid, *args: Any) -> Any:
        fits.append(grid.tokens == query.shape[1])
        return inner(query, key, value, mask, slot, grid, *args)

    monkeypatch.setattr(op, "_called", checked)
    seen = []
    for grid in [(3, 8, 8), (3, 8, 8), (5, 8, 8), (3, 6, 10), (3, 8, 8)]:
        forward(target, grid=grid)
        seen.append(counter.frame_count)
    assert seen == frames
    assert len(fits) == (5 * len(model.blocks) if enabled else 0)
    assert all(fits)


@pytest.mark.parametrize("mode", MODES)
def test_the_first_forward_of_a_thread_may_be_compiled(mode: str) -> None:
    model, seen = tiny.transformer(layers=2), []
    falloff.enable(model, tiny.Frames())
    target = compiled(model, mode, "eager")
    thread = threading.Thread(target=lambda: seen.append(forward(target)))
    thread.start()
    thread.join()
    (first,) = seen
    assert torch.equal(first, forward(model))


@pytest.mark.parametrize("mode", MODES)
def test_enable_after_compile_disable_enable(mode: str) -> None:
    model, counter = tiny.transformer(layers=1), CompileCounterWithBackend("eager")
    plain = forward(model)
    target = compiled(model, mode, counter)
    frames = []
    for enabled in (False, True, False, True):
        if enabled:
            falloff.enable(target, tiny.Frames())
        out = forward(target)
        assert torch.allclose(out, plain, atol=1e-6) is not enabled
        if enabled:
            assert [call.layer for call in falloff.report(target).calls] == [0]
            falloff.disable(target)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]


@pytest.mark.parametrize("enabled", [False, True])
def test_blocks_wrapped_one_by_one(enabled: bool) -> None:
    model, counter = tiny.transformer(), CompileCounterWithBackend("eager")
    plain = forward(model)
    with falloff.using(model, tiny.Frames()):
        sparse = forward(model)
    if enabled:
        falloff.enable(model, tiny.Frames())
    for number, block in enumerate(model.blocks):
        model.blocks[number] = torch.compile(block, backend=counter, fullgraph=True)
    if not enabled:
        torch.testing.assert_close(forward(model), plain, atol=1e-6, rtol=1e-6)
        falloff.enable(model, tiny.Frames())
    torch.testing.assert_close(forward(model), sparse, atol=1e-6, rtol=1e-6)
    assert [call.layer for call in falloff.report(model).calls] == [0, 1]
    assert counter.frame_count == (1 if enabled else 2)
    falloff.disable(model)
    torch.testing.assert_close(forward(model), plain, atol=1e-6, rtol=1e-6)


FAMILIES_WHOLE = ("HunyuanVideo", "FLUX.1", "CogVideoX")
"""Text after, an image with text before, and processors of ours in their place."""


def whole(name: str, seen: int, *, enabled: bool) -> tuple[nn.Module, Any, CompileCounterWithBackend]:
    """A model, itself as one full graph, and the count of its frames."""
    model, counter = FAMILIES[name].build(), CompileCounterWithBackend("eager")
    if enabled:
        falloff.enable(model, tiny.Frames(seen=seen, rows=FAMILIES[name].image))
    return model, torch.compile(model, backend=counter, fullgraph=True), counter


def sized(name: str, height: int) -> dict[str, Any]:
    return FAMILIES[name].arguments((1 if FAMILIES[name].image else 3, height, 5), 2)


@pytest.mark.parametrize("name", FAMILIES_WHOLE)
def test_whole_families_enabled_before_compile(name: str) -> None:
    model, target, counter = whole(name, 1, enabled=True)
    for height, frames in ((4, 1), (4, 1), (3, 2)):  # as many as without us
        torch.testing.assert_close(run(target, sized(name, height)), run(model, sized(name, height)), atol=1e-6, rtol=0)
        assert counter.frame_count == frames
    assert falloff.report(model).reasons == {}


@pytest.mark.parametrize("name", FAMILIES_WHOLE)
def test_whole_families_enabled_after_compile(name: str) -> None:
    model, target, counter = whole(name, 1, enabled=False)
    plain = run(model, sized(name, 4))
    for seen, frames in ((0, 1), (1, 2), (99, 2), (0, 2)):
        if seen:
            falloff.enable(target, tiny.Frames(seen=seen, rows=FAMILIES[name].image))
        sparse = run(model, sized(name, 4))
        torch.testing.assert_close(run(target, sized(name, 4)), sparse, atol=1e-6, rtol=0)
        assert (sparse - plain).abs().max().item() == 0 if seen != 1 else (sparse - plain).abs().max() > 1e-3
        assert counter.frame_count == frames
        if seen:
            falloff.disable(target)


@pytest.mark.parametrize("mode", MODES)
def test_lost_marks_are_told(mode: str) -> None:
    model = tiny.transformer(layers=1)
    falloff.enable(model, tiny.Frames())
    target = compiled(model, mode, "eager")
    forward(target)
    model.set_attention_backend("native")
    with pytest.raises(DetachedError, match="1 of 1"):
        forward(target)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it while tracing
def test_compiled_gradients() -> None:
    def gradients(target: Any) -> list[Tensor]:
        model.zero_grad()
        target(**tiny.inputs()).sample.square().mean().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    model = tiny.transformer()
    plain = gradients(model)
    falloff.enable(model, tiny.Frames())
    sparse = gradients(model)
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(model), sparse, atol=1e-6, rtol=1e-4)
    falloff.enable(model, "dense", replace=True)
    torch.testing.assert_close(gradients(model), plain, atol=1e-6, rtol=1e-4)
