import dataclasses
import json

import pytest
import torch

from falloff import Grid, Radial, Sequence, plan_for
from falloff.evaluation.bench import arms, attention, exact
from falloff.evaluation.bench.attention import Row, Work, measure
from falloff.evaluation.bench.shapes import shape_of
from falloff.evaluation.bench.tables import attention_table, notes, title
from falloff.evaluation.bench.timing import BenchmarkError, Times
from falloff.evaluation.figures import seconds, times
from falloff.kernels import run

CPU = torch.device("cpu")
TINY = shape_of("2,16,3x8x8")


def tiny(**changes: object) -> Work:
    return Work(**{"shape": TINY, "block": 16, **changes})  # type: ignore[arg-type]  # of mixed types


@pytest.fixture
def set_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arms are not timed: every forward takes what its name says, every backward twice as long."""
    seconds = {"sdpa": [0.8, 9.0, 0.7], "dense cpu": [0.4, 0.3, 0.5], "cpu": [0.1, 0.3, 0.2], "reference": [4.0] * 3}

    def interleaved(arms: dict[str, attention.Arm], **_: object) -> dict[str, Times]:
        return {
            name: Times(seconds[name], [2 * s for s in seconds[name]] if arm.backward else [])
            for name, arm in arms.items()
        }

    monkeypatch.setattr(attention, "interleaved", interleaved)
    monkeypatch.setattr(arms, "NO_PEER", ("reference",))


@pytest.mark.parametrize("backward", [False, True])
def test_figures_follow_from_the_times(set_times: None, backward: bool) -> None:
    row = measure(tiny(backward=backward), device=CPU, kernel_names=("cpu", "reference"))
    assert list(row.arms) == ["sdpa", "dense cpu", "cpu", "reference"]
    assert row.best_dense == "dense cpu"
    factor, products = (3, 3.5) if backward else (1, 1)
    for name, lasted, kind in (("sdpa", 0.8, "dense"), ("dense cpu", 0.4, "dense"), ("cpu", 0.2, "sparse")):
        arm = row.arms[name]
        assert arm.kind == kind
        assert arm.ms == pytest.approx(1e3 * lasted * factor)
        assert arm.forward_ms == pytest.approx(1e3 * lasted)
        assert arm.speedup == pytest.approx(0.4 / lasted)
        density = row.density if kind == "sparse" else 1
        assert arm.tflops == pytest.approx(4 * 16 * 2 * 192**2 * density * products / (lasted * factor) / 1e12)
    assert row.arms["cpu"].backward_ms == (pytest.approx(400) if backward else None)
    assert row.arms["cpu"].ms_best == pytest.approx(100 * factor)
    assert row.arms["cpu"].ms_worst == pytest.approx(300 * factor)
    assert row.arms["cpu"].efficiency == pytest.approx(2 * row.density)
    assert row.arms["sdpa"].efficiency is None
    assert row.arms["reference"].efficiency == pytest.approx(0.1 * row.density)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_measurement(dtype: str) -> None:
    doing: list[str] = []
    work = tiny(map="random:0.3", dtype=dtype, backward=True)
    row = measure(work, device=CPU, kernel_names=("cpu",), rounds=2, progress=doing.append)
    assert len(doing) == 2 + attention.STEPS_BESIDES
    assert (row.tokens, row.block, row.plan_ms, row.grid) == (192, 16, None, "3x8x8")
    for arm in row.arms.values():
        assert 0 < arm.ms_best <= arm.ms <= arm.ms_worst
        assert arm.speedup == pytest.approx(row.arms[row.best_dense].ms / arm.ms)
        assert arm.gradient_error is not None
        assert max(arm.relative_error, arm.gradient_error) < (1e-5 if dtype == "float32" else 2e-2)
    values = json.loads(json.dumps(row.to_dict(), allow_nan=False))
    assert values["arms"]["cpu"].keys() == set(attention.ArmResult.__dataclass_fields__)
    assert values["map"] == "random:0.3"


def test_kernels_that_cannot_run_are_rows_with_a_reason(set_times: None) -> None:
    row = measure(tiny(), device=CPU, kernel_names=("cpu", "cpu-tile"))
    assert "cpu-tile" not in row.arms
    assert row.refused["cpu-tile"].startswith(("it computes in bfloat16", "the CPU has neither"))
    assert "cpu-tile was not run: " in "\n".join(notes(row))
    stopped = dataclasses.replace(row, refused={"sdpa cudnn": "RuntimeError: no viable backend."})
    assert notes(stopped)[-1] == "sdpa cudnn was not run: RuntimeError: no viable backend."
    assert attention_table(row).row_count == len(row.arms) + 2  # and the ideal


def test_the_ideal_is_the_fastest_dense_attention_for_its_share_of_pairs(set_times: None) -> None:
    row = measure(tiny(), device=CPU, kernel_names=("cpu",))
    shown = attention_table(row)
    names, time, _, speedup, efficiency = (list(column.cells) for column in shown.columns[:5])
    at = names.index("ideal")
    assert row.best_dense == "dense cpu"
    assert row.density < 1
    assert time[at] == seconds(0.4 * row.density)
    assert (speedup[at], efficiency[at]) == (times(1 / row.density), "1.00")


def test_the_reference_is_left_out_unless_named(set_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.kernels, "available", lambda: [("cpu", True, ""), ("reference", True, "")])
    row = measure(tiny(), device=CPU)
    assert list(row.arms) == ["sdpa", "dense cpu", "cpu"]
    assert row.refused == {"reference": attention.UNNAMED}


def test_a_kernel_that_fails_does_not_end_the_others(set_times: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: object, name: str) -> object:
        def attend(*_: torch.Tensor) -> torch.Tensor:
            raise RuntimeError(f"no {name} today")

        return attend

    monkeypatch.setattr(arms, "on_plan", broken)
    row = measure(tiny(), device=CPU, kernel_names=("cpu",))
    assert list(row.arms) == ["sdpa"]
    assert row.refused == {"cpu": "RuntimeError: no cpu today", "dense cpu": "RuntimeError: no cpu today"}


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.Inputs, "random", None)
    monkeypatch.setattr("falloff.evaluation.bench.memory.free_bytes", lambda device: 10_000)
    with pytest.raises(BenchmarkError, match=r"radial, float32 needs about .* GB .* free"):
        measure(tiny(), device=CPU)


def test_the_reference_is_refused_where_its_mask_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falloff.evaluation.bench.memory.free_bytes", lambda device: 1_000_000)
    row = measure(tiny(), device=CPU, kernel_names=("reference",), rounds=1)
    assert list(row.arms) == ["sdpa"]
    assert "full mask" in row.refused["reference"]


def test_unknown_kernels() -> None:
    with pytest.raises(ValueError, match=r"'magic'.*reference"):
        attention.check_kernels(["cpu", "magic"])


@pytest.mark.parametrize("method", [Radial(block=16), Radial(block=16, window="disc", order="hilbert")])
def test_sampled_rows_are_the_references(method: Radial) -> None:
    sequence = Sequence(Grid(4, 5, 6), text=7)
    plan = plan_for(method, sequence)
    inputs = arms.Inputs.random(3, plan.q_len, 8, dtype=torch.float32, device=CPU, backward=True)
    sample = exact.sample(plan, *inputs)
    assert len(sample.rows) == exact.SAMPLED
    assert torch.equal(plan.keys_seen(sample.rows)[0], plan.mask()[0][:, sample.rows])
    out, _ = run(plan, *inputs[:3], impl="reference")
    (d_q,) = torch.autograd.grad(out, inputs.q, inputs.d_out)
    assert sample.error(out) < 1e-6
    assert sample.gradient_error(d_q) < 1e-6
    assert sample.error(1.01 * out) == pytest.approx(0.01, rel=1e-3)
    assert sample.gradient_error(0.9 * d_q) == pytest.approx(0.1, rel=1e-3)


def test_inputs_have_the_layout_of_pipelines() -> None:
    inputs = arms.Inputs.random(3, 10, 8, dtype=torch.float32, device=CPU, backward=True)
    for x in (inputs.q, inputs.k, inputs.v):
        assert x.shape == (1, 3, 10, 8)
        assert x.transpose(1, 2).is_contiguous()
        assert x.is_leaf
        assert x.requires_grad
    assert not torch.equal(inputs.q, inputs.k)


def test_titles_tell_the_work() -> None:
    row = Row(
        shape="wan", heads=40, head_dim=128, tokens=75600, grid="21x45x80", map="radial", block=128, dtype="bfloat16",
        backward=True, density=0.25, plan_ms=12.3, best_dense="sdpa cudnn", arms={}, refused={},
    )  # fmt: skip
    assert title(row) == (
        "wan: 40 heads x 128, 75,600 tokens (21x45x80), bfloat16, forward and backward\n"
        "radial map, blocks of 128, density 25.0%, planned in 12.3 ms"
    )
    assert notes(row)[0].startswith("Speed-up is over sdpa cudnn")
