"""Every family: dense is bit-equal, sparse is masked attention, at any grid, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, Family, run, shared
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import falloff
from falloff.hosts import host_for

VARIANTS = ("HunyuanVideo I2V", "CogVideoX 1.5 I2V", "Wan Animate")
"""Further models of a family whose layers are those of another one."""
GRIDS = {"video": (3, 4, 5), "image": (1, 4, 5)}


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def usual(family: Family, batch: int = 2) -> dict[str, Any]:
    return family.arguments(GRIDS["image" if family.image else "video"], batch)


def sparse(family: Family, seen: int = 1) -> tiny.Frames:
    return tiny.Frames(seen=seen, rows=family.image)


@contextmanager
def masked(length: int, mask_SS: Tensor) -> Iterator[None]:
    """PyTorch's attention with a mask over all calls of this length, and over those that padding has shortened."""
    native = torch.nn.functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **more: Any) -> Tensor:
        tokens = query.shape[-2]
        if key.shape[-2] == tokens and length - 8 < tokens <= length:
            pairs = mask_SS[..., :tokens, :tokens]
            attn_mask = pairs if attn_mask is None else attn_mask & pairs
        return native(query, key, value, attn_mask=attn_mask, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        yield


def test_whole_map_and_dense_are_bit_equal_and_leave_nothing(name: str) -> None:
    family, model = FAMILIES[name], shared(name)
    arguments = usual(family)
    plain = run(model, arguments)
    for method in ("dense", sparse(family, seen=99)):
        with falloff.using(model, method, schedule=tiny.ALWAYS):
            assert torch.equal(run(model, arguments), plain)
            report = falloff.report(model)
            assert sorted(call.layer for call in report.calls) == list(range(family.layers))
            assert set(report.kernels) == {"native"}
            assert set(report.reasons) <= {"method keeps attention dense"}
    assert torch.equal(run(model, arguments), plain)
    assert not [name for module in model.modules() for name in vars(module) if "falloff" in name]


def test_whole_map_through_our_kernel_is_close(name: str) -> None:
    family, model = FAMILIES[name], shared(name)
    arguments = usual(family)
    plain = run(model, arguments)
    with falloff.using(model, sparse(family, seen=99), kernel="cpu"):
        torch.testing.assert_close(run(model, arguments), plain, atol=1e-6, rtol=1e-5)
        assert falloff.report(model).kernels == {"cpu": family.layers}


def test_sparse_is_masked_attention_and_pins_text(name: str) -> None:
    family, model = FAMILIES[name], shared(name)
    arguments = usual(family)
    plain = run(model, arguments)
    with falloff.using(model, sparse(family)):
        out = run(model, arguments)
        report = falloff.report(model)
        seen = tuple(model._falloff.scene.layout.tolist()[:3])
    grid = GRIDS["image" if family.image else "video"]
    assert seen == grid
    tokens = grid[0] * grid[1] * grid[2] + family.text
    assert report.reasons == {}
    assert report.plan.q_len == tokens
    text = slice(0, family.text) if family.text_first else slice(tokens - family.text, tokens)
    assert report.plan.mask()[..., text, :].all()
    assert report.plan.mask()[..., text].all()
    with masked(tokens, report.plan.mask()):
        torch.testing.assert_close(out, run(model, arguments), atol=1e-5, rtol=1e-4)
    assert (out - plain).abs().max() > 1e-3


def test_samples_do_not_meet(name: str) -> None:
    family, model = FAMILIES[name], shared(name)
    with falloff.using(model, sparse(family)):
        both = run(model, usual(family))
        first = {key: of_first(key, value) for key, value in usual(family).items()}
        torch.testing.assert_close(run(model, first), both[:1], atol=1e-3, rtol=1e-3)  # Kandinsky rounds to bf16


def of_first(key: str, value: Any) -> Any:
    """What belongs to the first sample of an argument for two."""
    if key == "img_shapes" or (isinstance(value, Tensor) and value.ndim and value.shape[0] == 2):
        return value[:1]
    return value


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in VARIANTS])
def test_compiled_layers_equal_eager_in_one_frame(name: str) -> None:
    torch._dynamo.reset()
    family, model = FAMILIES[name], FAMILIES[name].build()
    arguments = usual(family)
    plain = run(model, arguments)
    falloff.enable(model, sparse(family))
    eager = run(model, arguments)
    counter = CompileCounterWithBackend("aot_eager")
    for block in blocks(model):
        block.compile(backend=counter, fullgraph=True)
    torch.testing.assert_close(run(model, arguments), eager, atol=1e-6, rtol=1e-6)
    falloff.enable(model, sparse(family, seen=99), replace=True)
    torch.testing.assert_close(run(model, arguments), plain, atol=1e-6, rtol=1e-6)
    assert counter.frame_count == FRAMES.get(name, len({type(block) for block in blocks(model)}))
    torch._dynamo.reset()


FRAMES = {"CogVideoX": 2, "Mochi": 2}
"""Where layers of one type differ: in the strides of what reaches the first, and in the last one's lack of text."""


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks that self-attention layers are part of."""
    return [model.get_submodule(path.rpartition(".")[0]) for path in host_for(model).attention_paths(model)]


small = st.sampled_from([1, 1, 2, 3, 5, 7])


def test_odd_grids(name: str) -> None:
    """Our kernel agrees with the reference: blocks cut through frames, rows and text, and some hold all tokens."""
    family = FAMILIES[name].shallow()
    ours, theirs = (falloff.enable(family.build(), tiny.Band(), kernel=kernel) for kernel in ("cpu", "reference"))

    @settings(max_examples=50 if name in VARIANTS else 200, deadline=None, derandomize=True, database=None)
    @given(grid=st.tuples(small, small, small), batch=st.integers(1, 3), seed=st.integers(0, 99))
    def check(grid: tuple[int, int, int], batch: int, seed: int) -> None:
        frames = 1 if family.image else max(grid[0], family.least_frames)
        assume(frames * grid[1] * grid[2] >= family.least_tokens)
        arguments = family.arguments((frames, *grid[1:]), batch, seed)
        torch.testing.assert_close(run(ours, arguments), run(theirs, arguments), atol=2e-6, rtol=1e-5)
        report = falloff.report(ours)
        assert report.reasons == {}
        assert ours._falloff.scene.layout.tolist() == [frames, *grid[1:], 1]
        assert report.plan.q_len == frames * grid[1] * grid[2] + family.text

    check()
