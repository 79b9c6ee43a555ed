import pytest
import torch
from decoders import tokenizer

from falloff.decoding.tokenizer import VQTokenizer


def test_names_and_shapes_of_the_released_tokenizer() -> None:
    with torch.device("meta"):
        state = VQTokenizer().state_dict()
    shapes = {
        "encoder.conv_in.weight": [128, 3, 3, 3],
        "encoder.conv_out.weight": [256, 512, 3, 3],
        "encoder.conv_blocks.3.downsample.conv.weight": [256, 256, 3, 3],
        "encoder.conv_blocks.4.attn.1.proj_out.weight": [512, 512, 1, 1],
        "encoder.mid.1.q.weight": [512, 512, 1, 1],
        "encoder.norm_out.weight": [512],
        "quant_conv.weight": [8, 256, 1, 1],
        "quantize.embedding.weight": [16384, 8],
        "post_quant_conv.weight": [256, 8, 1, 1],
        "decoder.conv_in.weight": [512, 256, 3, 3],
        "decoder.conv_blocks.0.attn.2.norm.weight": [512],
        "decoder.conv_blocks.3.upsample.conv.weight": [128, 128, 3, 3],
        "decoder.conv_blocks.4.res.2.conv2.weight": [128, 128, 3, 3],
        "decoder.conv_out.weight": [3, 128, 3, 3],
    }
    assert {name: list(state[name].shape) for name in shapes} == shapes
    shortcuts = {name.removesuffix(".nin_shortcut.weight") for name in state if name.endswith("nin_shortcut.weight")}
    assert shortcuts == {
        "encoder.conv_blocks.2.res.0",
        "encoder.conv_blocks.4.res.0",
        "decoder.conv_blocks.1.res.0",
        "decoder.conv_blocks.3.res.0",
    }
    attending = {name.split(".attn.")[0] for name in state if ".attn." in name}
    assert attending == {"encoder.conv_blocks.4", "decoder.conv_blocks.0"}
    assert not [name for name in state if name.startswith(("encoder.conv_blocks.4.down", "decoder.conv_blocks.4.up"))]
    assert sum(tensor.numel() for tensor in state.values()) == pytest.approx(72e6, rel=0.01)


@torch.no_grad()
def test_codes_are_nearest_in_squared_distance_of_unit_vectors() -> None:
    made = tokenizer()
    images = torch.rand(2, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes = made.encode(images)
    assert codes.shape == (2, 3, 5)
    latents = torch.nn.functional.normalize(made.latents(images), dim=1).movedim(1, -1)
    rows = torch.nn.functional.normalize(made.quantize.embedding.weight, dim=1)
    assert torch.equal(codes, (latents[..., None, :] - rows).square().sum(dim=-1).argmin(dim=-1))
    assert len(codes.unique()) > 1


@torch.no_grad()
def test_lengths_of_codebook_rows_mean_nothing() -> None:
    made = tokenizer()
    images = torch.rand(1, 3, 12, 20, generator=torch.Generator().manual_seed(0)) * 2 - 1
    codes, rebuilt = made.encode(images), made.decode(made.encode(images))
    assert rebuilt.shape == images.shape
    made.quantize.embedding.weight *= torch.linspace(0.5, 3, 11)[:, None]
    assert torch.equal(made.encode(images), codes)
    torch.testing.assert_close(made.decode(codes), rebuilt)


@torch.no_grad()
def test_downsampling_pads_right_and_below() -> None:
    made = tokenizer()
    down = made.encoder.conv_blocks[0].downsample
    image = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.zeros(1, 8, 5, 5)
    padded[:, :, :4, :4] = image
    torch.testing.assert_close(
        down(image), torch.nn.functional.conv2d(padded, down.conv.weight, down.conv.bias, stride=2)
    )


@pytest.mark.parametrize("shape", [(1, 3, 10, 20), (1, 1, 12, 20), (3, 12, 20)])
def test_images_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[batch, 3, height, width\] with sides that are multiples of 4, got"):
        tokenizer().encode(torch.zeros(shape))
