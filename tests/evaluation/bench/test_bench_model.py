import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from falloff import Full
from falloff.evaluation.bench import model, models, ways
from falloff.evaluation.bench.model import measure, operations
from falloff.evaluation.bench.models import HUNYUAN, MODELS, WAN, TrueModel
from falloff.evaluation.bench.shapes import on_grid
from falloff.evaluation.bench.tables import model_notes, model_table
from falloff.evaluation.bench.timing import BenchmarkError, Times, tried
from falloff.evaluation.comparison import attention_ceiling
from falloff.geometry import Grid
from falloff.hosts import UnsupportedModelError

CPU = torch.device("cpu")
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "text_dim": 16,
    "freq_dim": 16,
    "ffn_dim": 32,
    "rope_max_seq_len": 32,
}
TINY = TrueModel(shape=on_grid("tiny", 2, 12, Grid(4, 8, 8)), kind=WAN, config=CONFIG, text=4)


@pytest.fixture
def made() -> torch.nn.Module:
    return models.build(TINY, torch.float32, CPU)


@pytest.mark.parametrize(
    ("name", "layers", "share", "bound"),
    [
        ("wan1.3b-480p", 30, 0.68, 3.2),
        ("wan14b-480p", 40, 0.48, 1.9),
        ("wan14b-720p", 40, 0.68, 3.2),
        ("hunyuan-720p", 60, 0.77, 4.4),
    ],
)
def test_operations_of_true_models(name: str, layers: int, share: float, bound: float) -> None:
    """Shares and bounds that follow from the published sizes."""
    parameters = {"wan1.3b": 1.42e9, "wan14b": 14.3e9, "hunyuan": 12.8e9}[name.split("-")[0]]
    attention, rest = operations(MODELS[name], layers, int(parameters))
    assert attention / (attention + rest) == pytest.approx(share, abs=0.006)
    assert attention_ceiling(attention / (attention + rest)) == pytest.approx(bound, abs=0.1)


def test_true_sizes() -> None:
    counted = models.on_meta(MODELS["wan1.3b-480p"])
    parameters = sum(parameter.numel() for parameter in counted.parameters())
    assert parameters == pytest.approx(1.42e9, rel=0.01)
    assert all(parameter.is_meta for parameter in counted.parameters())
    needed = models.bytes_needed(MODELS["wan1.3b-480p"], torch.bfloat16)
    assert 2 * parameters < needed < 4 * parameters


def test_weights_are_made_in_place_and_leave_no_trace() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    made = models.build(TINY, torch.bfloat16, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_default_dtype() == torch.float32
    weights = dict(made.named_parameters())
    assert weights["blocks.0.attn1.to_q.weight"].dtype == torch.bfloat16
    assert weights["blocks.0.scale_shift_table"].dtype == torch.float32  # as its family keeps it
    assert not any(weight.requires_grad for weight in weights.values())
    again = dict(models.build(TINY, torch.bfloat16, CPU).named_parameters())
    assert all(torch.equal(weight, again[name]) for name, weight in weights.items())


def test_a_forward_sees_the_shapes_tokens(made: torch.nn.Module) -> None:
    inputs = models.inputs(TINY, made, torch.float32, CPU)
    assert inputs["hidden_states"].shape == (1, 16, 4, 16, 16)
    assert inputs["encoder_hidden_states"].shape == (1, 4, 16)
    seen: list[int] = []
    made.blocks[0].attn1.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[1]))  # type: ignore[union-attr]  # a block
    ways.Runner(made, inputs).forward()
    assert seen == [TINY.shape.tokens] == [256]


def test_figures_follow_from_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "NO_PEER", ())
    seconds = {"dense": [0.9, 0.8, 2.0], "dense, cpu": [0.6, 0.5, 0.7], "radial, cpu": [0.2, 0.1, 0.3]}
    monkeypatch.setattr(
        model, "interleaved", lambda able, **_: {name: Times(taken, []) for name, taken in seconds.items()}
    )
    row = measure(TINY, dtype=torch.float32, device=CPU, kernel_names=("cpu",))
    assert list(row.arms) == list(seconds)
    assert row.best_dense == "dense, cpu"
    sparse = row.arms["radial, cpu"]
    assert (sparse.kind, sparse.ms, sparse.ms_best, sparse.ms_worst) == ("sparse", 200, 100, 300)
    assert sparse.speedup == pytest.approx(3)
    assert row.arms["dense"].speedup == pytest.approx(0.6 / 0.9)
    assert row.arms["dense"].kernels == {"native": 2}
    assert sparse.kernels == row.arms["dense, cpu"].kernels == {"cpu": 2}
    for bound in (row.by_operations, row.by_time):
        assert 0 < bound.share <= 1
        assert bound.at_density == pytest.approx(attention_ceiling(bound.share, row.density))
        assert bound.without_attention == pytest.approx(attention_ceiling(bound.share))
    notes = "\n".join(model_notes(row))
    assert "3.00x by radial, cpu" in notes
    assert "over dense, cpu, the fastest" in notes
    assert model_table(row).row_count == 3


def test_a_real_measurement() -> None:
    doing: list[str] = []
    row = measure(
        TINY, dtype=torch.bfloat16, device=CPU, kernel_names=("auto", "cpu-tile"), rounds=2, progress=doing.append
    )
    assert len(doing) == 2 + model.STEPS_BESIDES
    assert (row.dtype, row.layers, row.tokens, row.grid) == ("bfloat16", 2, 256, "4x8x8")
    assert 0 < row.density < 1
    assert {arm.kind for arm in row.arms.values()} == {"dense", "sparse"}
    assert all(0 < arm.ms_best <= arm.ms <= arm.ms_worst for arm in row.arms.values())
    json.dumps(row.to_dict(), allow_nan=False)


def test_dense_peers_stand_in_for_torchs_attention(made: torch.nn.Module) -> None:
    runner = ways.Runner(made, models.inputs(TINY, made, torch.float32, CPU))
    seen: list[tuple[int, int]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return F.scaled_dot_product_attention(q, k, v)

    way = ways.Way(kind="dense", attend=attend)
    expected = runner.forward()
    with runner.arm(way).around():
        assert torch.equal(runner.forward(), expected)
    assert seen == [(256, 256), (256, 4)] * 2
    observed = runner.observe(way, CPU)
    assert 0 < observed.attention_seconds < observed.seconds
    assert 0 < observed.share < 1
    assert not hasattr(made, "_falloff")


def test_every_block_gives_the_dense_output(made: torch.nn.Module) -> None:
    runner = ways.Runner(made, models.inputs(TINY, made, torch.float32, CPU))
    expected = runner.forward()
    with runner.arm(ways.Way(kind="dense", method=ways.EveryBlock(), kernel="reference")).around():
        torch.testing.assert_close(runner.forward(), expected)


def test_calls_that_stay_dense_are_not_reported_as_sparse(made: torch.nn.Module) -> None:
    runner = ways.Runner(made, models.inputs(TINY, made, torch.float32, CPU))
    able, refused = tried({"sparse": runner.arm(ways.Way(kind="sparse", method=Full()))}, CPU)
    assert not able
    assert "calls stayed dense" in refused["sparse"]
    assert not hasattr(made, "_falloff")


def test_a_kernel_that_cannot_run_is_a_row_with_a_reason() -> None:
    row = measure(TINY, dtype=torch.float32, device=CPU, kernel_names=("cpu-tile",), rounds=1)
    assert list(row.arms) == ["dense"]
    assert "cannot run this call" in row.refused["radial, cpu-tile"]
    assert "none measured" in model_notes(row)[0]


def test_what_cannot_fit_is_refused_before_it_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "build", None)
    monkeypatch.setattr("falloff.evaluation.bench.memory.free_bytes", lambda device: 10_000)
    with pytest.raises(BenchmarkError, match=r"tiny in bfloat16 needs about .* GB"):
        measure(TINY, dtype=torch.bfloat16, device=CPU)


def test_masks_of_hunyuan_are_dropped_for_dense_peers() -> None:
    """Its attention gets a mask that keeps everything, which the fast dense kernels do not take."""
    hunyuan = TrueModel(
        shape=on_grid("hunyuan", 2, 12, Grid(2, 4, 4), text=5),
        kind=HUNYUAN,
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 4, 4),
        },
        text=5,
    )
    made = models.build(hunyuan, torch.float32, CPU)
    given = models.inputs(hunyuan, made, torch.float32, CPU)
    lengths: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths.append(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v)

    expected = made(**given, return_dict=False)[0]
    with ways.Instead(attend):
        torch.testing.assert_close(made(**given, return_dict=False)[0], expected)
    assert lengths == [hunyuan.shape.tokens] * 2


def test_families_without_a_host_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("falloff.hosts.hosts", lambda: ())
    with pytest.raises(UnsupportedModelError, match="WanTransformer3DModel"):
        measure(TINY, dtype=torch.float32, device=CPU)


def test_unknown_models() -> None:
    with pytest.raises(ValueError, match=r"'2,64,100'.*wan14b-720p"):
        models.model_of("2,64,100")
