import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from worded import SIZE, pipeline

import falloff
from falloff.evaluation import figures, report
from falloff.evaluation.compare import Progress, compare
from falloff.evaluation.comparison import Comparison, attention_ceiling
from falloff.evaluation.generate import NotFiniteError, generate
from falloff.evaluation.video import read
from falloff.schedule import Schedule

SPARSE = Schedule(dense_first=1, dense_layers=(0,))
NARROW = falloff.Radial(decay=0.0, block=2, sink_frames=0, neighbour="decayed")  # a frame sees itself alone


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline()


@pytest.fixture(scope="module")
def found(pipe: Any) -> tuple[Comparison, list[Progress]]:
    told: list[Progress] = []
    methods = [NARROW, "dense"]
    comparison = compare(pipe, ["a fox", "fox fox"], methods, seeds=[3], schedule=SPARSE, progress=told.append, **SIZE)
    return comparison, told


def test_arms_and_floor(found: tuple[Comparison, list[Progress]]) -> None:
    comparison, _ = found
    radial, full = comparison.methods
    assert [arm.label for arm in comparison.methods] == ["radial", "dense method"]
    assert comparison.dense.psnr == [math.inf, math.inf]
    assert comparison.dense.ssim == pytest.approx([1.0, 1.0])
    assert full.psnr == [math.inf, math.inf]
    assert full.density is None
    assert full.effective_density == 1.0
    assert full.block_map is None
    assert radial.density is not None
    assert radial.density < 1
    assert radial.density < radial.effective_density < 1
    assert all(value < 100 for value in radial.psnr)


def test_every_dense_call_has_its_reason(found: tuple[Comparison, list[Progress]]) -> None:
    radial = found[0].methods[0]
    passes, layers, steps, pairs = 2, 2, SIZE["num_inference_steps"], 2
    calls = passes * layers * steps * pairs
    assert sum(radial.reasons.values()) + sum(radial.kernels.values()) == calls
    assert set(radial.reasons) == {"dense layer", "dense first step"}


def test_videos_are_kept_for_every_pair(found: tuple[Comparison, list[Progress]]) -> None:
    for arm in (found[0].dense, *found[0].methods):
        assert [read(video).shape for video in arm.videos] == [(5, 32, 32, 3)] * 2


def test_decay_and_shares(found: tuple[Comparison, list[Progress]]) -> None:
    comparison, _ = found
    assert {curve.axis for curve in comparison.decay} == {"time", "raster", "space"}
    assert all(len(curve.layers) == 2 for curve in comparison.decay)
    assert 0 < comparison.dense.attention_share < 1
    assert 0 < comparison.attention_share_of_run < 1


def test_progress_counts_every_step(found: tuple[Comparison, list[Progress]]) -> None:
    _, told = found
    runs = 2 * 4 * SIZE["num_inference_steps"] + 3 * 2
    assert [progress.done for progress in told] == list(range(1, runs + 1))
    assert {progress.total for progress in told} == {runs}


def test_order_rotates(found: tuple[Comparison, list[Progress]]) -> None:
    doing = list(dict.fromkeys(progress.doing for progress in found[1]))
    first = ["dense", "radial", "dense method", "dense again"]
    second = ["radial", "dense method", "dense again", "dense"]
    assert doing[3:] == [*(f"{way}, pair 1 of 2" for way in first), *(f"{way}, pair 2 of 2" for way in second)]


def test_json_is_strict(found: tuple[Comparison, list[Progress]]) -> None:
    values = json.loads(json.dumps(found[0].to_dict(), allow_nan=False))
    assert values["dense"]["psnr"] == ["inf", "inf"]
    assert values["methods"][0]["settings"]["block"] == 2
    assert values["methods"][0]["speedup"] > 0
    assert values["call_arguments"] == SIZE
    assert {"machine", "versions", "command", "model"} <= set(values)


def test_table_and_page_of_a_real_comparison(found: tuple[Comparison, list[Progress]]) -> None:
    assert figures.table(found[0]).row_count == len(figures.rows(found[0]))
    assert "every call stayed dense" in report.html(found[0])


def test_many_methods_are_lines_of_the_terminal_table() -> None:
    heads = [f"way {n}" for n in range(7)]
    rows = [figures.Row(name, [f"{name} {n}" for n in range(7)], "") for name in ("time", "density")]
    for few in (heads[:5], heads):
        shown = figures.terminal("title", few, [row._replace(cells=row.cells[: len(few)]) for row in rows])
        cells = [[column.header, *column.cells] for column in shown.columns]
        expected = [["", *few], *([row.name, *row.cells[: len(few)]] for row in rows)]
        turned = [list(line) for line in zip(*expected, strict=True)]
        assert cells == (turned if len(few) == 5 else expected)


def state(pipe: Any) -> tuple[Any, ...]:
    processors = [type(module.processor) for module in pipe.transformer.modules() if hasattr(module, "processor")]
    return vars(pipe).get("_progress_bar_config"), processors, hasattr(pipe.transformer, "_falloff")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_pipeline_is_left_as_it_was(pipe: Any, error: type[BaseException]) -> None:
    before = state(pipe)

    def stop(progress: Progress) -> None:
        if progress.doing.startswith("radial, pair"):
            raise error

    with pytest.raises(error):
        compare(pipe, "a fox", NARROW, schedule=SPARSE, progress=stop, **SIZE)
    assert state(pipe) == before


@pytest.mark.parametrize(
    ("prompts", "methods", "seeds"),
    [([], "radial", [0]), ("fox", [], [0]), ("fox", "radial", []), (" ", "radial", [0])],
)
def test_nothing_to_compare(pipe: Any, prompts: Any, methods: Any, seeds: Any) -> None:
    with pytest.raises(ValueError, match="at least one prompt that is not empty, one method and one seed"):
        compare(pipe, prompts, methods, seeds=seeds)


def test_wrong_arguments(pipe: Any) -> None:
    with pytest.raises(TypeError, match=r"takes no argument 'frames' here; legal are .*num_frames"):
        compare(pipe, "fox", "radial", frames=5)
    with pytest.raises(TypeError, match="takes no argument 'generator' here"):
        compare(pipe, "fox", "radial", generator=None)
    with pytest.raises(ValueError, match="unknown method 'radail'"):
        compare(pipe, "fox", "radail")
    with pytest.raises(ValueError, match="given twice"):
        compare(pipe, "fox", ["radial", "radial"])


def test_an_attached_pipeline_is_refused(pipe: Any) -> None:
    with falloff.using(pipe, "radial"), pytest.raises(ValueError, match="disable"):
        compare(pipe, "fox", "radial", **SIZE)


def test_same_seed_same_video(pipe: Any) -> None:
    first, second, other = (generate(pipe, "fox", seed=seed, call_arguments=SIZE) for seed in (0, 0, 1))
    assert np.array_equal(first.frames_FHWC, second.frames_FHWC)
    assert not np.array_equal(first.frames_FHWC, other.frames_FHWC)
    assert first.seconds > 0


def test_not_finite_output_is_an_error(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pipe.transformer.forward

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        return tuple(out * torch.nan for out in forward(*args, **kwargs))

    monkeypatch.setattr(pipe.transformer, "forward", spoiled)
    with pytest.raises(NotFiniteError, match="'fox' holds NaN"):
        generate(pipe, "fox", seed=0, call_arguments=SIZE)


@pytest.mark.parametrize(
    ("share", "density", "ceiling"),
    [(0.5, 0.0, 2.0), (0.5, 0.5, 4 / 3), (0.8, 1.0, 1.0), (0.0, 0.0, 1.0), (1, 0, math.inf)],
)
def test_ceiling_is_amdahls_law(share: float, density: float, ceiling: float) -> None:
    assert attention_ceiling(share, density) == pytest.approx(ceiling)


def test_ceiling_takes_shares_only() -> None:
    with pytest.raises(ValueError, match=r"share = 1.5 is outside 0.0 to 1.0"):
        attention_ceiling(1.5)


def test_an_interrupted_comparison_goes_on(pipe: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    stop_after = 5

    def counted(pipe: Any, prompt: str, **given: Any) -> Any:
        if given["call_arguments"] == SIZE:  # no short run before
            if len(runs) == stop_after:
                raise KeyboardInterrupt
            runs.append(prompt)
        return generate(pipe, prompt, **given)

    def made(prompts: list[str]) -> Comparison:
        return compare(pipe, prompts, [NARROW, "dense"], schedule=SPARSE, kept=tmp_path / "kept", **SIZE)

    monkeypatch.setattr("falloff.evaluation.compare.generate", counted)
    with pytest.raises(KeyboardInterrupt):
        made(["a fox", "fox fox"])
    assert len(runs) == 5
    stop_after = 99
    resumed = made(["a fox", "fox fox"])
    assert len(runs) == 8  # of dense, two methods and the probe on two prompts
    again = made(["a fox", "fox fox"])
    assert len(made(["a fox"]).pairs) == 1
    assert len(runs) == 8
    fresh = compare(pipe, ["a fox", "fox fox"], [NARROW, "dense"], schedule=SPARSE, **SIZE)
    assert again.methods[0].seconds == resumed.methods[0].seconds
    for got in (resumed, again):
        assert got.methods[0].psnr == fresh.methods[0].psnr
        assert got.methods[0].recall == fresh.methods[0].recall
        assert [curve.mean for curve in got.decay] == [curve.mean for curve in fresh.decay]
        assert got.methods[0].reasons == fresh.methods[0].reasons
    made(["a fox", "fox fox", "fox"])
    assert len(runs) == 8 + 8 + 4  # the fresh comparison, and the third prompt
