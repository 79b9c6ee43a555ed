"""Where a run stands, from what pipelines and schedulers tell."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch

from falloff.hosts.where import MAX_PASSES, Watch

BRANCHES = ("cond", "uncond")


class Pipe:
    """A pipeline as far as a watch sees one."""

    def __init__(self, timesteps: list[float], **scheduler: Any) -> None:
        self.scheduler = SimpleNamespace(**scheduler)
        self._current_timestep: torch.Tensor | None = None
        self._num_timesteps = len(timesteps)
        self.timesteps = [torch.tensor(t) for t in timesteps]


def seen(watch: Watch, context: Any = None, timestep: float = 0.0) -> tuple[int, int | None, int | None, str | None]:
    position = watch.look(context, torch.tensor([timestep]))
    return position.run, position.step, position.steps, position.branch


def test_pipeline_context_is_believed() -> None:
    pipe = Pipe([9.0, 5.0, 1.0])
    watch = Watch(pipe, BRANCHES)
    for step in (0, 2):
        pipe._current_timestep = pipe.timesteps[step]
        for name in ("uncond", "cond"):
            context = SimpleNamespace(name=name, step_index=step, num_inference_steps=3)
            assert seen(watch, context) == (0, step, 3, name)


def test_scheduler_counts_from_where_the_run_began() -> None:
    pipe = Pipe([5.0, 1.0], step_index=None, begin_index=None)
    watch = Watch(pipe, BRANCHES)
    pipe._current_timestep = pipe.timesteps[0]
    assert [seen(watch), seen(watch)] == [(0, 0, 2, "cond"), (0, 0, 2, "uncond")]
    pipe._current_timestep, pipe.scheduler.step_index = pipe.timesteps[1], 4
    assert seen(watch) == (0, 1, 2, "cond")


def test_scheduler_without_index_is_counted_by_timesteps() -> None:
    pipe = Pipe([5.0, 1.0])
    watch = Watch(pipe, BRANCHES)
    for step in (0, 1):
        pipe._current_timestep = pipe.timesteps[step]
        assert [seen(watch)[1:], seen(watch)[1:]] == [(step, 2, "cond"), (step, 2, "uncond")]


def test_end_of_a_pipeline_call_starts_a_run() -> None:
    pipe = Pipe([5.0], step_index=None)
    watch = Watch(pipe, BRANCHES)
    pipe._current_timestep = pipe.timesteps[0]
    assert seen(watch)[0] == 0
    watch.end_run()
    assert seen(watch) == (1, 0, 1, "cond")


def test_interrupted_run_does_not_leak_into_the_next() -> None:
    pipe = Pipe([9.0, 5.0], step_index=None)
    watch = Watch(pipe, BRANCHES)
    for run in (0, 1):
        for step, index in ((0, None), (1, 1)):
            pipe._current_timestep, pipe.scheduler.step_index = pipe.timesteps[step].clone(), index
            assert seen(watch)[:2] == (run, step)
    pipe._current_timestep, pipe.scheduler.step_index = pipe.timesteps[0].clone(), None
    assert seen(watch)[:2] == (2, 0)
    pipe._current_timestep = pipe.timesteps[0].clone()  # interrupted in its first step
    assert seen(watch)[:2] == (3, 0)


def test_forward_by_hand_is_no_step_of_an_idle_pipeline() -> None:
    pipe = Pipe([9.0, 5.0], step_index=None)
    watch = Watch(pipe, BRANCHES)
    pipe._current_timestep = pipe.timesteps[0]
    assert seen(watch) == (0, 0, 2, "cond")
    pipe._current_timestep = None
    assert seen(watch, timestep=3.0) == (1, 0, None, "cond")


def test_without_a_pipeline_timesteps_tell_the_order() -> None:
    watch = Watch(None, ())
    values = [9.0, 9.0, 5.0, 5.0, 1.0, 9.0]
    assert [seen(watch, timestep=t)[:2] for t in values] == [(0, 0), (0, 0), (0, 1), (0, 1), (0, 2), (1, 0)]
    assert [seen(watch, timestep=4.0)[3] for _ in range(2)] == ["pass 1", "pass 2"]


def test_pipeline_that_never_says_where_it_is_tells_its_steps() -> None:
    pipe = Pipe([9.0, 5.0])
    del pipe._current_timestep
    watch = Watch(pipe, BRANCHES)
    values = [9.0, 9.0, 5.0, 5.0, 9.0]
    assert [seen(watch, timestep=t)[:3] for t in values] == [(0, 0, 2), (0, 0, 2), (0, 1, 2), (0, 1, 2), (1, 0, 2)]
    assert watch.look(None, 9.0).branch == "uncond"  # a plain number will do


def test_one_timestep_for_ever_is_many_runs() -> None:
    watch = Watch(None, ())
    runs = [seen(watch, timestep=9.0)[0] for _ in range(3 * MAX_PASSES)]
    assert runs == sorted(MAX_PASSES * [0, 1, 2])


def test_timestep_per_token_takes_the_largest() -> None:
    watch = Watch(None, ())
    assert watch.look(None, torch.tensor([[0.0, 9.0]])).step == 0
    assert watch.look(None, torch.tensor([[0.0, 5.0]])).step == 1


def test_copy_follows_the_copied_pipeline_or_none() -> None:
    pipe = Pipe([9.0], step_index=None)
    pair = SimpleNamespace(pipe=pipe, watch=Watch(pipe, BRANCHES))
    twin = copy.deepcopy(pair)
    twin.pipe._current_timestep = twin.pipe.timesteps[0]
    assert seen(twin.watch)[2] == 1
    alone = copy.deepcopy(pair.watch)
    pipe._current_timestep = pipe.timesteps[0]
    assert seen(alone)[2] is None
