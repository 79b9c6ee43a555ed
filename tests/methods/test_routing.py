"""Sparse VideoGen's bands, and heads that choose between plans."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from falloff.cli.settings import choose, words
from falloff.geometry import Grid, Sequence
from falloff.kernels import run
from falloff.methods import SLA, SVG1, AdaSpa, Call, Dense, Full, Method, Radial, Router, State, get, routing
from falloff.methods.routing import merged, output_errors, sampled_queries
from falloff.methods.svg1 import patch_major
from falloff.plan import BlockMap, Plan, PlanError, dense_plan

GRID = Grid(6, 4, 8)
BAND = SVG1(block=16, density=0.4)


def qkv(tokens: int, batch: int = 1, heads: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, heads, tokens, 16, generator=generator) for _ in range(3))
    return q, k, v


def heads_in_space_and_time(sequence: Sequence) -> tuple[Tensor, Tensor, Tensor]:
    """Head 0 attends to its own frame, head 1 to its own place, both sharply."""
    grid = sequence.grid
    token = torch.arange(grid.tokens)
    codes = torch.randn(2, max(grid.frames, grid.frame_tokens), 16, generator=torch.Generator().manual_seed(0))
    video = torch.stack([codes[0][token // grid.frame_tokens], codes[1][token % grid.frame_tokens]])[None]
    q = torch.randn(1, 2, sequence.tokens, 16, generator=torch.Generator().manual_seed(1))
    q[:, :, sequence.video_start :][:, :, : grid.tokens] = 4 * video
    return q, q.clone(), torch.randn(q.shape, generator=torch.Generator().manual_seed(2))


def plan(method: Method, sequence: Sequence, tensors: tuple[Tensor, ...], state: State | None = None) -> Plan:
    made = method.plan(Call(sequence=sequence), *tensors, State() if state is None else state)
    assert isinstance(made, Plan)
    return made


def test_patch_major_order_and_published_widths() -> None:
    assert patch_major(Grid(2, 1, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    wan, hunyuan = Sequence(Grid(21, 45, 80)), Sequence(Grid(33, 45, 80), 256)
    assert SVG1(density=0.25).width(wan) / 3600 == pytest.approx(2.8134665, abs=1e-6)
    assert SVG1(density=0.3).width(wan) / 3600 == pytest.approx(3.4301, abs=1e-4)
    assert SVG1(density=0.25).width(hunyuan) / 3600 == pytest.approx(4.3487, abs=1e-3)


@pytest.mark.parametrize(("density", "with_sink"), [(0.25, 0.293), (0.3, 0.34)])
def test_bands_keep_the_published_share(density: float, with_sink: float) -> None:
    sequence = Sequence(Grid(21, 45, 80))
    for sinks, share in ((0, density), (1, with_sink)):
        method = SVG1(density=density, sink_frames=sinks)
        for band in (method.spatial(sequence), method.temporal(sequence)):
            assert band.density == pytest.approx(share, abs=0.012)


def test_bands_are_where_they_should_be() -> None:
    sequence, method = Sequence(GRID), dataclasses.replace(BAND, block=8)
    spatial, temporal = (band.mask()[0, 0] for band in (method.spatial(sequence), method.temporal(sequence)))
    token = torch.arange(GRID.tokens)
    places = token % GRID.frame_tokens * GRID.frames + token // GRID.frame_tokens
    width, slack = method.width(sequence), 2 * method.block
    for mask, line in ((spatial, token), (temporal, places)):
        distance = (line[:, None] - line).abs()
        assert mask[distance <= width - slack].all()
        assert not mask[:, GRID.frame_tokens + slack :][
            (distance > width + slack)[:, GRID.frame_tokens + slack :]
        ].any()


@pytest.mark.parametrize("side", ["after", "before"])
@pytest.mark.parametrize(("sinks", "text"), [(1, 0), (1, 5), (2, 20), (9, 3)])
def test_first_frames_and_text_are_seen_in_both_orders(side: str, sinks: int, text: int) -> None:
    sequence = Sequence(GRID, text, side)
    method = dataclasses.replace(BAND, sink_frames=sinks)
    first = slice(sequence.video_start, sequence.video_start + min(sinks, 6) * GRID.frame_tokens)
    words = torch.ones(sequence.tokens, dtype=torch.bool)
    words[sequence.video_start :][: GRID.tokens] = False
    for band in (method.spatial(sequence), method.temporal(sequence)):
        mask = band.mask()[0, 0]
        assert mask[:, first].all()
        assert mask[words].all()
        assert mask[:, words].all()
        assert mask.diagonal().all() or sinks < 6


def test_every_query_sees_something_even_in_the_narrowest_band() -> None:
    narrow = SVG1(block=4, density=1e-6, sink_frames=0)
    for grid in (GRID, Grid(5, 3, 7), Grid(1, 1, 3)):
        for band in (narrow.spatial(Sequence(grid)), narrow.temporal(Sequence(grid))):
            assert band.mask().any(-1).all()


@pytest.mark.parametrize(("text", "side"), [(0, "after"), (7, "after"), (7, "before")])
def test_heads_get_the_band_that_they_need(text: int, side: str) -> None:
    sequence = Sequence(GRID, text, side)
    q, k, v = heads_in_space_and_time(sequence)
    method = dataclasses.replace(BAND, density=0.25)
    made = plan(method, sequence, (q, k, v))
    spatial, temporal = method.spatial(sequence), method.temporal(sequence)
    assert torch.equal(made.mask()[0, 0], spatial.mask()[0, 0])
    assert torch.equal(made.mask()[0, 1], temporal.mask()[0, 0])
    dense = run(dense_plan(sequence.tokens, sequence.tokens), q, k, v)[0]
    error = [float((run(band, q, k, v)[0] - dense).norm()) for band in (made, spatial, temporal)]
    assert error[0] < min(error[1:])


@pytest.mark.parametrize("score_bytes", [routing.SCORE_BYTES, 1 << 40])
def test_errors_are_those_of_the_output(monkeypatch: pytest.MonkeyPatch, score_bytes: int) -> None:
    monkeypatch.setattr(routing, "SCORE_BYTES", score_bytes)  # all heads together, or one by one
    sequence = Sequence(GRID, 4, "before")
    q, k, v = qkv(sequence.tokens, batch=2)
    queries = sampled_queries(sequence, 30)
    plans = [BAND.spatial(sequence), BAND.temporal(sequence)]
    errors = output_errors(plans, sequence, q, k, v, queries)
    weights = (q[:, :, queries] @ k[:, :, 4:].mT / 4).softmax(-1)
    dense = weights @ v[:, :, 4:]
    for made, error in zip(plans, errors, strict=True):
        kept = weights * made.mask()[:, :, queries][..., 4:]
        sparse = kept / kept.sum(-1, keepdim=True) @ v[:, :, 4:]
        torch.testing.assert_close(error, (sparse - dense).square().sum((2, 3)) / dense.square().sum((2, 3)))


def test_sampled_queries_lie_on_the_whole_grid() -> None:
    sequence = Sequence(GRID, 6, "before")
    assert sampled_queries(sequence, 999).tolist() == list(range(6, 6 + GRID.tokens))
    some = sampled_queries(sequence, 40, seed=3)
    assert torch.equal(some, sampled_queries(sequence, 40, seed=3))
    assert len(set(some.tolist())) == 40
    assert some.max() > 0.8 * GRID.tokens


def test_merged_plans_keep_every_head_its_map() -> None:
    generator = torch.Generator().manual_seed(0)
    choice = torch.randint(0, 4, (2, 5), generator=generator)
    order = torch.randperm(40, generator=generator)
    plans = [
        uniform(40, 8, None, None),
        uniform(40, 8, order, None),
        uniform(40, 16, None, order.flip(0).expand(2, 5, -1)),
        Plan(
            q_len=40,
            kv_len=40,
            q_sizes=torch.tensor([30, 0, 10]),
            kv_sizes=torch.tensor([[[7, 33]]]),
            blocks=BlockMap.from_dense(torch.tensor([[True, False], [False, True], [True, True]])),
        ),
    ]
    both = merged(plans, choice)
    for b in range(2):
        for h in range(5):
            expected = plans[choice[b, h]].mask().expand(2, 5, -1, -1)
            assert torch.equal(both.mask()[b, h], expected[b, h])
    assert merged(plans[:2], choice % 2).q_sizes == 8
    q, k, v = qkv(40, batch=2, heads=5)
    torch.testing.assert_close(run(both, q, k, v, impl="cpu"), run(both, q, k, v, impl="reference"))


def uniform(tokens: int, size: int, q_order: Tensor | None, kv_order: Tensor | None) -> Plan:
    count = -(-tokens // size)
    heads = () if kv_order is None else (2, 5)
    blocks = torch.rand(*heads, count, count, generator=torch.Generator().manual_seed(size)) < 0.5
    blocks[..., 0] = True
    return Plan(
        q_len=tokens,
        kv_len=tokens,
        q_sizes=size,
        kv_sizes=size,
        blocks=BlockMap.from_dense(blocks),
        q_order=q_order,
        kv_order=kv_order,
    )


def test_plans_that_do_not_go_together_are_refused() -> None:
    one = uniform(40, 8, None, None)
    for other in (uniform(41, 8, None, None), dataclasses.replace(one, summary=True)):
        with pytest.raises(PlanError, match="plans to choose from must be complete"):
            merged([one, other], torch.zeros(1, 1, dtype=torch.int64))


def test_an_unchanged_choice_is_the_same_plan() -> None:
    state, sequence = State(), Sequence(GRID)
    tensors = heads_in_space_and_time(sequence)
    first = plan(BAND, sequence, tensors, state)
    assert plan(BAND, sequence, tensors, state) is first
    swapped = tuple(x.flip(1) for x in tensors)
    assert not torch.equal(plan(BAND, sequence, swapped, state).mask(), first.mask())
    other = State(shared=state.shared)
    plan(BAND, sequence, tensors, other)
    assert len(state.shared) == 1


def test_the_router_takes_each_heads_best() -> None:
    sequence = Sequence(GRID)
    tensors = heads_in_space_and_time(sequence)
    radial, adaspa = Radial(block=16, decay=0.0, neighbour="decayed"), AdaSpa(block=16, sparsity=0.9)
    router = Router(candidates=(radial, adaspa, BAND), rows=GRID.tokens)
    candidates = [plan(method, sequence, tensors) for method in (radial, adaspa, BAND)]
    errors = output_errors(candidates, sequence, *tensors, torch.arange(GRID.tokens))
    made = plan(router, sequence, tensors)
    for head, best in enumerate(errors.argmin(0)[0].tolist()):
        assert torch.equal(made.mask()[0, head], candidates[best].mask().expand(1, 2, -1, -1)[0, head])
    lax = plan(dataclasses.replace(router, tolerance=1e9), sequence, tensors)
    assert lax.density == pytest.approx(min(candidate.density for candidate in candidates))


def test_a_candidate_that_stays_dense_is_out_of_it() -> None:
    sequence, tensors = Sequence(GRID), qkv(GRID.tokens)
    radial = Radial(block=16)
    assert torch.equal(
        plan(Router(candidates=(Full(), radial)), sequence, tensors).mask()[0, 0],
        plan(radial, sequence, tensors).mask()[0, 0],
    )
    alone = Router(candidates=(Full(),)).plan(Call(sequence=sequence), *tensors, State())
    assert alone == Dense("method keeps attention dense")


def test_a_batch_of_two_is_two_batches_of_one() -> None:
    sequence, tensors = Sequence(GRID), qkv(GRID.tokens, batch=2)
    both = plan(BAND, sequence, tensors).mask()
    for b in range(2):
        assert torch.equal(plan(BAND, sequence, tuple(x[b : b + 1] for x in tensors)).mask()[0], both[b])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_stays_dense(which: int) -> None:
    tensors = qkv(GRID.tokens)
    tensors[which][0, 1] = torch.nan
    made = BAND.plan(Call(sequence=Sequence(GRID)), *tensors, State())
    assert isinstance(made, Dense)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (SVG1, {"density": 0.0}, r"density = 0.0 is outside"),
        (SVG1, {"block": 0}, r"block = 0 must be a whole number of at least 1"),
        (SVG1, {"sink_frames": -1}, r"sink_frames = -1"),
        (SVG1, {"rows": 0}, r"rows = 0"),
        (Router, {"candidates": ()}, r"candidates is empty"),
        (Router, {"candidates": (7,)}, r"expected a method, its name or .* got 7"),
        (Router, {"candidates": ("radail",)}, r"unknown method 'radail'"),
        (Router, {"candidates": (Radial(), SLA())}, r"candidates = sla have trained parameters"),
        (Router, {"tolerance": -1.0}, r"tolerance = -1.0 is negative"),
        (Router, {"rows": 0}, r"rows = 0"),
    ],
)
def test_settings_are_checked(kind: type[Method], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_settings_round_trip() -> None:
    router = Router(candidates=["adaspa", {"name": "radial", "window": "disc", "order": "hilbert"}, BAND])
    assert router.settings()["candidates"][:2] == [
        "adaspa",
        {"name": "radial", "window": "disc", "order": "hilbert"},
    ]
    assert get("router", **router.settings()) == router
    assert hash(router) == hash(get("router", **router.settings()))
    assert SVG1(**BAND.settings()) == BAND


def test_candidates_on_the_command_line() -> None:
    method = choose("router", ["candidates=svg1,adaspa", "tolerance=0.5"]).method
    assert method == Router(candidates=(SVG1(), AdaSpa()), tolerance=0.5)
    assert words(tuple[str | Method, ...]) == "names with commas between"
