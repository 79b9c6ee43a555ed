"""Which steps and layers stay dense."""

import pytest

from falloff.schedule import Schedule


def dense_steps(schedule: Schedule, steps: int, layer: int = 5) -> list[int]:
    return [i for i in range(steps) if schedule.reason(layer=layer, step=i, steps=steps)]


def test_shares_and_counts() -> None:
    assert dense_steps(Schedule(dense_first=0.24), 50) == list(range(12))
    assert dense_steps(Schedule(dense_first=2, dense_last=1), 6) == [0, 1, 5]
    assert dense_steps(Schedule(dense_first=0, dense_layers=()), 6) == []
    assert dense_steps(Schedule(dense_first=0, dense_layers=(0, 5)), 3) == [0, 1, 2]


def test_reasons() -> None:
    schedule = Schedule(dense_first=1, dense_last=1, dense_layers=(0,))
    assert schedule.reason(layer=0, step=3, steps=5) == "dense layer"
    assert schedule.reason(layer=1, step=0, steps=5) == "dense first step"
    assert schedule.reason(layer=1, step=4, steps=5) == "dense last step"
    assert schedule.reason(layer=1, step=2, steps=5) is None
    assert schedule.reason(layer=1, step=None, steps=None) == "step unknown"
    assert Schedule(dense_first=0).reason(layer=1, step=None, steps=None) is None


@pytest.mark.parametrize(
    ("share", "layers", "dense"),
    [
        (0.025, 40, (0,)),
        (0.025, 30, (0,)),
        (0.025, 6, ()),
        (0.5, 4, (0, 1)),
        (0.0, 40, ()),
        (0.025, None, (0,)),
        (0.0, None, ()),
    ],
)
def test_a_share_of_layers_is_the_first_ones(share: float, layers: int | None, dense: tuple[int, ...]) -> None:
    schedule = Schedule(dense_first=0, dense_layers=share)
    assert schedule.dense_of(layers) == dense
    named = schedule.named(layers)
    assert named == Schedule(dense_first=0, dense_layers=dense) == named.named(3)
    assert [i for i in range(40) if named.reason(layer=i, step=0, steps=1)] == list(dense)


def test_layers_that_are_named_are_those_of_any_model() -> None:
    assert Schedule(dense_layers=(1, 7)).dense_of(40) == Schedule(dense_layers=(1, 7)).dense_of(None) == (1, 7)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"dense_first": 1.5}, ValueError, "dense_first = 1.5 is outside 0.0 to 1.0"),
        ({"dense_last": -1}, ValueError, "dense_last = -1 is negative"),
        ({"dense_first": "half"}, TypeError, "dense_first must be a number"),
        ({"dense_layers": (-1,)}, ValueError, "dense_layers must be layer indices"),
        ({"dense_layers": 2.0}, ValueError, "dense_layers = 2.0 is outside 0.0 to 1.0, the shares of all layers; name"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Schedule(**settings)
