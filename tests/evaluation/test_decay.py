import math

import numpy as np
import pytest
import torch

from falloff.evaluation.decay import DecayObserver, Profile, by_distance, fit, mean_attention
from falloff.evaluation.probe import Probe
from falloff.geometry import Grid, Sequence
from falloff.methods.base import Call, Dense, State

SEQUENCE = Sequence(Grid(3, 4, 5), text=7, text_side="before")


def qkv(sequence: Sequence = SEQUENCE) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, sequence.tokens, 8, generator=draw) for _ in range(3)]


def test_fit_recovers_an_exponential() -> None:
    x = np.arange(10)
    result = fit(x, np.exp(-0.7 * x - 1.5))
    assert result is not None
    assert (result.a, result.b, result.r2) == pytest.approx((0.7, -1.5, 1.0))


def test_fit_needs_three_distances() -> None:
    assert fit(np.arange(4), np.array([0.5, 0.0, 0.0, 0.1])) is None


def test_mean_attention_is_the_mean_of_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = qkv()
    expected = (q @ k.mT / math.sqrt(8)).softmax(-1).mean((0, 1))
    torch.testing.assert_close(mean_attention(q, k), expected)
    monkeypatch.setattr("falloff.evaluation.decay.SCRATCH_BYTES", 1)
    torch.testing.assert_close(mean_attention(q, k), expected)


def test_distances_of_every_axis() -> None:
    grid = SEQUENCE.grid
    query = torch.tensor([27])  # frame 1, row 1, column 2
    rows = torch.rand(1, grid.frames, grid.frame_tokens)
    axes = by_distance(SEQUENCE, query, rows)
    distance, weight = axes["time"]
    assert distance.tolist() == [[1, 0, 1]]
    torch.testing.assert_close(weight, rows[:, :, 7])
    distance, weight = axes["raster"]
    assert distance[0].tolist() == [abs(7 - other) for other in range(20)]
    torch.testing.assert_close(weight, rows[:, 1])
    distance, _ = axes["space"]
    assert distance[0, [7, 8, 12, 13, 0]].tolist() == [0, 1, 1, 1, 2]


def test_profile_averages_pairs_of_all_layers() -> None:
    profile = Profile(tokens=10)
    profile.add("time", 0, torch.tensor([0, 1, 1]), torch.tensor([1.0, 0.2, 0.4]))
    profile.add("time", 1, torch.tensor([0, 1, 2]), torch.tensor([0.5, 0.3, 0.1]))
    (curve,) = profile.curves()
    assert curve.distance == [0, 1, 2]
    assert curve.mean == pytest.approx([0.75, 0.3, 0.1])
    assert curve.layers == [pytest.approx([1.0, 0.3, 0.0]), pytest.approx([0.5, 0.3, 0.1])]
    assert curve.uniform == 0.1


def test_probe_answers_dense_and_looks_at_its_steps_only() -> None:
    observer = DecayObserver(queries=16)
    probe = Probe(observers=(observer,), steps=2)
    q, k, v = qkv()
    for step in range(8):
        for layer in range(2):
            call = Call(sequence=SEQUENCE, layer=layer, layers=2, step=step, steps=8)
            assert isinstance(probe.plan(call, q, k, v, State()), Dense)
    curves = {curve.axis: curve for curve in observer.profile.curves()}
    assert set(curves) == {"time", "raster", "space"}
    assert float(observer.profile.counts["time", 1].sum()) == 2 * 16 * 3
    assert all(len(curve.layers) == 2 for curve in curves.values())


def test_draws_are_seeded() -> None:
    q, k, v = qkv()
    means = []
    for seed in (0, 0, 1):
        observer = DecayObserver(queries=4, seed=seed)
        observer.see(Call(sequence=SEQUENCE), q, k, v, State())
        means.append(observer.profile.curves()[0].mean)
    assert means[0] == means[1] != means[2]


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="queries = 0 must be at least 1"):
        DecayObserver(queries=0)
    with pytest.raises(ValueError, match="steps = 0 must be at least 1"):
        Probe(observers=(), steps=0)
