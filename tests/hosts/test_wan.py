"""Every Wan pipeline: dense is bit-equal, steps and branches are right, and leaving leaves nothing."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

import falloff
from falloff.reporting import Record

PIPELINES = {
    "t2v": tiny.t2v,
    "t2v, Euler": lambda: tiny.t2v(scheduler_name="euler"),
    "t2v, timesteps of tokens": lambda: tiny.t2v(expand_timesteps=True),
    "t2v, two experts": lambda: tiny.t2v(experts=2),
    "i2v": tiny.i2v,
    "v2v": tiny.v2v,
}


@pytest.fixture(params=PIPELINES)
def pipe(request: pytest.FixtureRequest) -> Any:
    return PIPELINES[request.param]()


def steps_of(pipe: Any) -> int:
    return 3 if "VideoToVideo" in type(pipe).__name__ else 4  # the strength of 0.8 skips the first of four


def where(record: Record) -> tuple[Any, ...]:
    return record.run, record.step, record.branch, record.layer


def test_dense_is_bit_equal_and_leaves_nothing(pipe: Any) -> None:
    plain = tiny.generate(pipe)
    before = {name: dict(vars(p)) for name, p in pipe.transformer.attn_processors.items()}
    with falloff.using(pipe, "dense"):
        assert torch.equal(tiny.generate(pipe), plain)
        assert set(falloff.report(pipe).kernels) == {"native"}
    assert torch.equal(tiny.generate(pipe), plain)
    for model in filter(None, (pipe.transformer, getattr(pipe, "transformer_2", None))):
        for module in model.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
            assert not [name for name in vars(module) if "falloff" in name]
        assert not model._diffusers_hook.hooks
        assert "forward" not in vars(model)
    assert {name: dict(vars(p)) for name, p in pipe.transformer.attn_processors.items()} == before


def test_sparse_calls_know_step_branch_and_layer(pipe: Any) -> None:
    plain = tiny.generate(pipe)
    falloff.enable(pipe, tiny.Frames())
    for run in range(2):
        assert not torch.equal(tiny.generate(pipe), plain)
        report = falloff.report(pipe)
        expected = [
            (run, step, branch, layer)
            for step in range(steps_of(pipe))
            for branch in ("cond", "uncond")
            for layer in range(2)
        ]
        assert [where(call) for call in report.calls] == expected
        assert report.density == pytest.approx(5 / 9)
        assert not report.reasons


def test_experts_take_turns_on_one_count_of_steps() -> None:
    pipe = tiny.t2v(experts=2)
    falloff.enable(pipe, tiny.Frames(), schedule=falloff.Schedule(dense_first=1, dense_last=1, dense_layers=()))
    tiny.generate(pipe, guidance=1.0)
    report = falloff.report(pipe)
    assert [(call.step, call.model) for call in report.calls if call.layer == 0] == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert report.reasons == {"dense first step": 2, "dense last step": 2}


def test_schedule_holds_in_a_run_that_begins_in_the_middle() -> None:
    pipe = tiny.v2v()
    falloff.enable(pipe, tiny.Frames(), schedule=falloff.Schedule(dense_first=1, dense_last=1, dense_layers=(0,)))
    tiny.generate(pipe)
    assert falloff.report(pipe).reasons == {"dense layer": 6, "dense first step": 2, "dense last step": 2}


def test_interrupted_run_is_followed_by_a_clean_one() -> None:
    pipe = tiny.t2v()
    falloff.enable(pipe, tiny.Frames())

    def stop(pipe: Any, step: int, timestep: Any, kwargs: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny.generate(pipe, callback_on_step_end=stop)
    tiny.generate(pipe)
    report = falloff.report(pipe)
    assert len(report.calls) == 4 * 2 * 2
    assert {call.step for call in report.calls} == {0, 1, 2, 3}


def test_two_sizes_in_turn_are_each_as_alone() -> None:
    method = falloff.Radial(block=8)
    pipes = [falloff.enable(tiny.t2v(), method, schedule=tiny.ALWAYS) for _ in range(2)]
    sizes = [{"frames": 9, "size": 64}, {"frames": 13, "size": 96}]
    alone = [tiny.generate(falloff.enable(tiny.t2v(), method, schedule=tiny.ALWAYS), **size) for size in sizes]
    for _ in range(2):
        for pipe, size, expected in zip(pipes, sizes, alone, strict=True):
            assert torch.equal(tiny.generate(pipe, **size), expected)
    both = pipes[0]
    for size, expected in zip(sizes * 2, alone * 2, strict=True):
        assert torch.equal(tiny.generate(both, **size), expected)
