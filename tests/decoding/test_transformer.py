import pytest
import torch
from decoders import model, orders, sample, teacher_forced

from falloff.decoding.transformer import NO_CLASS, SIZES, LPDTransformer, resized_positions


@pytest.mark.parametrize(("size", "millions"), [("L", 337.157120), ("XL", 752), ("XXL", 1410)])
def test_published_sizes(size: str, millions: float) -> None:
    with torch.device("meta"):
        made = LPDTransformer(**SIZES[size])
    parameters = sum(p.numel() for p in made.parameters())
    assert parameters / 1e6 == pytest.approx(millions, rel=1e-9 if size == "L" else 0.005)


def test_names_and_shapes_of_the_released_checkpoints() -> None:
    with torch.device("meta"):
        made = LPDTransformer(**{**SIZES["L"], "layers": 1})
    block = {
        "norm1.weight": [1024],
        "norm1.bias": [1024],
        "attn.qkv.weight": [3072, 1024],
        "attn.qkv.bias": [3072],
        "attn.proj.weight": [1024, 1024],
        "attn.proj.bias": [1024],
        "norm2.weight": [1024],
        "norm2.bias": [1024],
        "mlp.fc1.weight": [4096, 1024],
        "mlp.fc1.bias": [4096],
        "mlp.fc2.weight": [1024, 4096],
        "mlp.fc2.bias": [1024],
    }
    expected = {
        "class_emb.weight": [1000, 1024],
        "token_emb.weight": [16384, 1024],
        "fake_latent": [1, 1024],
        "pos_embed": [1, 257, 1024],
        "mask_token": [1, 1, 1024],
        "z_proj_ln.weight": [1024],
        "z_proj_ln.bias": [1024],
        **{f"blocks.0.{name}": shape for name, shape in block.items()},
        "norm.weight": [1024],
        "norm.bias": [1024],
        "head.weight": [16384, 1024],
    }
    assert {name: list(tensor.shape) for name, tensor in made.state_dict().items()} == expected


def test_forward_is_the_written_formula() -> None:
    """One layer by hand: shared norm after the position, pre-norm attention and MLP, no norm of q or k."""
    made = model(layers=1)
    tokens, labels = sample(1)
    state = dict(made.state_dict())

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(dim=-1, keepdim=True)
        scaled = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return scaled * state[f"{name}.weight"] + state[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ state[f"{name}.weight"].mT + state[f"{name}.bias"]

    rows = torch.stack(
        [
            state["class_emb.weight"][labels[0]] + state["pos_embed"][0, 0],
            state["token_emb.weight"][tokens[0, 7]] + state["pos_embed"][0, 8],
            state["mask_token"][0, 0] + state["pos_embed"][0, 3],
        ]
    )
    x = norm(rows, "z_proj_ln")
    q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").split(32, dim=1)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        heads.append((q[:, part] @ k[:, part].mT / 8**0.5).softmax(dim=-1) @ v[:, part])
    x = x + linear(torch.cat(heads, dim=1), "blocks.0.attn.proj")
    hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    x = x + linear(hidden, "blocks.0.mlp.fc2")
    expected = norm(x, "norm")[2] @ state["head.weight"].mT

    def everything(_: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    with torch.no_grad():
        logits = made(labels, tokens[:, 7:8], torch.tensor([[7]]), torch.tensor([[2]]), everything)
    torch.testing.assert_close(logits[0, 0], expected, rtol=0, atol=1e-12)


def test_no_class_is_its_own_vector() -> None:
    made, places = model(), orders(1)
    tokens, labels = sample(1)
    none = teacher_forced(made, tokens, torch.full_like(labels, NO_CLASS), places)
    with torch.no_grad():
        made.fake_latent.copy_(made.class_emb.weight[labels])
    torch.testing.assert_close(
        teacher_forced(made, tokens, torch.full_like(labels, NO_CLASS), places),
        teacher_forced(made, tokens, labels, places),
    )
    assert not torch.allclose(none, teacher_forced(made, tokens, labels, places))


def test_initial_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LPDTransformer(width=64, layers=1, heads=2, vocabulary=500)
    for weight in (made.class_emb.weight, made.token_emb.weight, made.pos_embed):
        assert float(weight.detach().std()) == pytest.approx(0.02, rel=0.05)
    fan = 64 + 192
    assert float(made.blocks[0].attn.qkv.weight.detach().std()) == pytest.approx((2 / fan) ** 0.5, rel=0.05)
    assert not made.blocks[0].attn.qkv.bias.any()
    assert made.head.bias is None


def test_positions_of_another_grid() -> None:
    positions = torch.randn(1, 1 + 16, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(resized_positions(positions, (4, 4), (4, 4)), positions)
    larger = resized_positions(positions, (4, 4), (8, 6))
    assert larger.shape == (1, 49, 6)
    assert torch.equal(larger[:, 0], positions[:, 0])
    with pytest.raises(ValueError, match="positions of a 4 x 5 grid are 1 \\+ 20, got 17"):
        resized_positions(positions, (4, 5), (8, 6))


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width = 30 is not a multiple of heads = 4"):
        LPDTransformer(width=30, heads=4)
