"""Published presets give the published sparsity."""

import pytest

from falloff.geometry import Grid, Sequence
from falloff.methods import METHODS, Radial, get
from falloff.methods.presets import PRESETS, preset


@pytest.mark.parametrize(
    ("name", "grid", "percent"),
    [
        ("radial/wan2.1-14b", Grid(18, 48, 80), 28.7),
        ("radial/hunyuan", Grid(30, 48, 80), 27.5),
        ("radial/hunyuan-4x", Grid(128, 45, 80), 11.63),
        ("radial/mochi-4x", Grid(112, 30, 53), 14.4),
    ],
)
def test_densities_are_within_a_point_and_a_quarter_of_the_published(name: str, grid: Grid, percent: float) -> None:
    method = preset(name).method
    assert isinstance(method, Radial)
    assert 100 * method.block_map(Sequence(grid)).mean() == pytest.approx(percent, abs=1.25)


def test_every_preset_has_evidence_and_round_trips() -> None:
    for name, entry in PRESETS.items():
        assert entry.evidence, name
        assert get(name.split("/")[0], **entry.method.settings()) == entry.method


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown preset 'wan9'; choose one of radial/wan2\.1-14b"):
        preset("wan9")
    with pytest.raises(ValueError, match=r"unknown method 'radail'; choose one of .*dense, .*radial"):
        get("radail")
    with pytest.raises(ValueError, match="radial has no setting 'decoy'; it has decay, block"):
        get("radial", decoy=1)
    assert all(method.name == name for name, method in METHODS.items())
