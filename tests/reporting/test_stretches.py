"""Steps and layers in words."""

from __future__ import annotations

from test_picture import dense, record

from falloff import Radial, Schedule
from falloff.reporting import Report
from falloff.reporting.report import STRETCHES_TOLD
from falloff.reporting.stretches import by_layer, by_step


def run(**more: float) -> list:
    """Two dense steps, then three sparse ones whose layer 0 is dense."""
    first = [dense("dense first step", step=step, layer=layer, **more) for step in (0, 1) for layer in (0, 1, 2)]
    dense_layer = [dense("dense layer", step=step, layer=0, **more) for step in (2, 3, 4)]
    sparse = [record(step=step, layer=layer, density=step / 10, **more) for step in (2, 3, 4) for layer in (1, 2)]
    return first + dense_layer + sparse


def test_steps_and_layers_of_one_kind_are_one_line() -> None:
    assert [(stretch.name, stretch.words) for stretch in by_step(run())] == [
        ("0 to 1", "dense (dense first step)"),
        ("2 to 4", "20.0% to 40.0% of the pairs; 3 of 9 calls dense (dense layer)"),
    ]
    assert [(stretch.name, stretch.words) for stretch in by_layer(run())] == [
        ("0", "dense (dense first step, dense layer)"),
        ("1 to 2", "20.0% to 40.0% of the pairs; 4 of 10 calls dense (dense first step)"),
    ]


def test_milliseconds_where_they_were_measured() -> None:
    first, second = by_step(run(attention_seconds=0.0125))
    assert first.words == "dense (dense first step), 12.5 ms a call"
    assert second.words.count("12.5 ms a call") == 2


def test_unknown_steps_and_many_reasons() -> None:
    calls = [dense(f"reason {number}", step=None) for number in range(5)]
    (only,) = by_step(calls)
    assert (only.name, only.words) == ("unknown", "dense (reason 0, reason 1, reason 2 and 2 more reasons)")


def test_steps_are_in_order_whatever_the_order_of_the_calls() -> None:
    calls = [record(step=None), record(step=2), dense("dense first step", step=0), record(step=1)]
    assert [stretch.name for stretch in by_step(calls)] == ["0", "1 to 2", "unknown"]


def test_report_tells_them_and_leaves_out_the_middle_of_many() -> None:
    settings = {"method": Radial(), "schedule": Schedule(), "forward_seconds": None, "plan": None, "choice": None}
    text = str(Report(calls=run(), **settings))
    assert "step 2 to 4       20.0% to 40.0%" in text
    assert "layer 1 to 2      20.0% to 40.0%" in text
    assert "layer" not in str(Report(calls=[record(layer=0), record(layer=1)], **settings)).replace("dense_layers", "")
    restless = [dense(f"reason {step}", step=step) for step in range(20)]
    text = str(Report(calls=restless, **settings))
    assert f"step ...          {20 - STRETCHES_TOLD} more such lines" in text
    assert "step 19 " in text
    assert "step 10 " not in text
