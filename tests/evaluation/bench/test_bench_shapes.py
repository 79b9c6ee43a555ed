import pytest
import torch

from falloff.cli import bench
from falloff.evaluation.bench import maps
from falloff.evaluation.bench.shapes import SHAPES, shape_of
from falloff.methods.presets import preset


@pytest.mark.parametrize(
    ("name", "heads", "head_dim", "tokens"),
    [
        ("wan1.3b-480p", 12, 128, 32_760),
        ("wan14b-480p", 40, 128, 32_760),
        ("wan14b-720p", 40, 128, 75_600),
        ("wan14b-720p-4x", 40, 128, 291_600),
        ("hunyuan-720p", 24, 128, 118_800 + 256),
        ("hunyuan-720p-4x", 24, 128, 460_800 + 256),
        ("miniature", 4, 32, 4_352),
    ],
)
def test_named_shapes(name: str, heads: int, head_dim: int, tokens: int) -> None:
    shape = shape_of(name, bench.shapes())
    assert (shape.heads, shape.head_dim, shape.tokens) == (heads, head_dim, tokens)


def test_the_miniature_has_its_checkpoints_shape() -> None:
    from falloff.cli import checkpoint

    model, bundled = bench.models()["miniature"], checkpoint.find(None)
    assert model.shape.heads == model.config["num_attention_heads"]
    assert model.shape.head_dim == model.config["attention_head_dim"]
    assert model.shape.sequence is not None
    assert bundled.frames_factor is not None
    assert model.shape.sequence.grid.frames == (bundled.defaults["num_frames"] - 1) // bundled.frames_factor + 1


def test_explicit_shapes() -> None:
    on_grid = shape_of("2,64,3x10x7")
    assert (on_grid.heads, on_grid.head_dim, on_grid.tokens, on_grid.grid) == (2, 64, 210, "3x10x7")
    bare = shape_of("8,32,1000")
    assert (bare.heads, bare.head_dim, bare.tokens, bare.sequence) == (8, 32, 1000, None)


@pytest.mark.parametrize("text", ["wan", "2,64", "2,64,-5", "2,64,3x4", "2,64,3x4x5x6", "0,64,100", "2,64,0x4x5"])
def test_shapes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match=r"unknown shape .* wan14b-720p.*HEADS|at least one"):
        shape_of(text)


def test_a_models_preset_makes_its_map() -> None:
    assert maps.method_of("radial", SHAPES["hunyuan-720p"]) == preset("radial/hunyuan").method
    assert maps.method_of("radial", SHAPES["wan14b-720p"]) == preset("radial/wan2.1-14b").method
    assert maps.method_of("radial/mochi", SHAPES["wan14b-720p"]) == preset("radial/mochi").method
    assert maps.method_of("radial", shape_of("1,32,3x8x8"), block=16).settings()["block"] == 16


def test_random_maps_have_their_density_and_diagonal() -> None:
    shape = shape_of("8,32,5000")
    plan = maps.plan_of("random:0.3", shape, block=64)
    assert plan.density == pytest.approx(0.3, abs=0.01)
    blocks = plan.blocks.dense()[0]
    assert blocks.shape == (8, 79, 79)
    assert bool(blocks.diagonal(dim1=1, dim2=2).all())
    assert not torch.equal(blocks[0], blocks[1])
    assert maps.plan_of("random:1", shape, block=64).density == 1


@pytest.mark.parametrize(
    ("name", "block", "words"),
    [
        ("random:much", None, "must be a number"),
        ("random:1.5", None, "outside"),
        ("random:0.001", None, "diagonal alone"),
        ("radiul", None, "choose one of .*dense, .*radial"),
        ("dense", None, "keeps attention dense"),
        ("dense", 64, "takes no block size"),
    ],
)
def test_maps_that_are_none(name: str, block: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        maps.check(name, shape_of("2,32,4x10x10"), block)


def test_a_method_needs_a_grid() -> None:
    with pytest.raises(ValueError, match="FRAMESxHEIGHTxWIDTH"):
        maps.check("radial", shape_of("2,32,400"))
