"""What cannot be served is refused with its reason, or stays dense and says why; nothing is half attached."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from diffusers import Kandinsky5Transformer3DModel, SanaVideoTransformer3DModel, SkyReelsV2Transformer3DModel
from families import FAMILIES, run
from torch import nn

import falloff
from falloff.hosts import UnsupportedModelError, host_for, hosts
from falloff.hosts.flux import grid_of


def untouched(model: nn.Module) -> bool:
    hooks = [module for module in model.modules() if module._forward_pre_hooks or module._forward_hooks]
    return not hooks and not hasattr(model, "_falloff")


def test_unknown_model_hears_what_is_known() -> None:
    with pytest.raises(UnsupportedModelError, match="does not know the model class Linear") as caught:
        falloff.enable(nn.Linear(1, 1), "dense")
    for host in hosts():
        assert all(f"{model} ({host.family})" in str(caught.value) for model in host.models)


def test_every_model_has_one_family_and_exists() -> None:
    import diffusers

    names = [name for host in hosts() for name in (*host.models, *host.refused)]
    assert len(names) == len(set(names))
    assert all(hasattr(diffusers, name) for name in names)
    tried = {family.model for family in FAMILIES.values()}
    assert tried == {name for host in hosts() for name in host.models}


def test_layers_are_in_order_of_their_numbers() -> None:
    model = tiny.transformer(12)
    assert host_for(model).attention_paths(model)[-2:] == ["blocks.10.attn1", "blocks.11.attn1"]


class Opaque(nn.Module):
    """A block as a converter leaves it: it computes the same and shows nothing inside."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.inside = (block,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inside[0](*args, **kwargs)


@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "CogVideoX"])
def test_hidden_attention_is_refused(name: str) -> None:
    model = FAMILIES[name].build()
    path = host_for(model).attention_paths(model)[-1]
    blocks, number, attention = path.rsplit(".", 2)
    block = model.get_submodule(blocks)[int(number)]
    model.get_submodule(blocks)[int(number)] = Opaque(block)
    with pytest.raises(UnsupportedModelError, match=rf"1 of \d {blocks} .* hide their self-attention \({attention}\)"):
        falloff.enable(model, tiny.Frames())
    assert untouched(model)
    model.get_submodule(blocks)[int(number)] = block
    setattr(block, attention, Opaque(getattr(block, attention)))
    with pytest.raises(UnsupportedModelError, match=rf"{path} is a Opaque without a processor"):
        falloff.enable(model, tiny.Frames())
    assert untouched(model)


def test_linear_attention_is_refused() -> None:
    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=8,
        sample_size=8,
    )
    with pytest.raises(UnsupportedModelError, match="SanaVideoTransformer3DModel: its self-attention is linear"):
        falloff.enable(model, "radial")
    assert untouched(model)


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "QwenImage"])
def test_method_between_frames_is_refused_for_images(name: str) -> None:
    model = FAMILIES[name].build()
    with pytest.raises(ValueError, match=r"radial leaves out pairs of frames, and .* makes images.*: dense"):
        falloff.enable(model, "radial")
    assert untouched(model)
    falloff.enable(model, "dense")


def test_sparse_attention_of_kandinskys_own_is_refused() -> None:
    config = {**FAMILIES["Kandinsky 5"].config, "attention_type": "nabla"}
    model = Kandinsky5Transformer3DModel(**config)
    with pytest.raises(UnsupportedModelError, match="sparse already"):
        falloff.enable(model, "radial")
    assert untouched(model)


def test_causal_blocks_of_skyreels_are_refused_when_a_run_asks_for_them() -> None:
    family = FAMILIES["SkyReels-V2"]
    model = SkyReelsV2Transformer3DModel(**family.config).eval()
    falloff.enable(model, "radial", schedule=tiny.ALWAYS)
    run(model, family.arguments((2, 4, 4)))
    model._set_ar_attention(2)
    with pytest.raises(UnsupportedModelError, match="causal blocks"):
        run(model, family.arguments((2, 4, 4)))
    falloff.disable(model)
    assert run(model, family.arguments((2, 4, 4))).isfinite().all()


def test_ltx_with_coordinates_alone_stays_dense() -> None:
    family = FAMILIES["LTX"]
    model = family.build()
    arguments = {**family.arguments((2, 3, 4)), "num_frames": None, "height": None, "width": None}
    arguments["video_coords"] = torch.rand(1, 3, 24)
    plain = run(model, arguments)
    falloff.enable(model, tiny.Frames())
    assert torch.equal(run(model, arguments), plain)
    (reason,) = falloff.report(model).reasons
    assert "coordinates in place of a size" in reason


def with_reference(name: str, reference: tuple[int, int]) -> dict[str, Any]:
    """Arguments for an image of 4 x 5 tokens and a reference image after it."""
    family, (height, width) = FAMILIES[name], reference
    arguments = family.arguments((1, 4, 5))
    other = family.arguments((1, height, width), seed=1)
    arguments["hidden_states"] = torch.cat([arguments["hidden_states"], other["hidden_states"]], dim=1)
    if name == "QwenImage":
        arguments["img_shapes"] = [[(1, 4, 5), (1, height, width)]]
    else:
        other["img_ids"] = other["img_ids"].clone()
        other["img_ids"][..., 0] = 10
        arguments["img_ids"] = torch.cat([arguments["img_ids"], other["img_ids"]], dim=-2)
    return arguments


@pytest.mark.parametrize("name", ["FLUX.1", "FLUX.2", "QwenImage"])
def test_reference_images_are_frames_where_they_fit(name: str) -> None:
    model = FAMILIES[name].build()
    falloff.enable(model, tiny.Frames())
    run(model, with_reference(name, (4, 5)))
    report = falloff.report(model)
    assert (report.plan.q_len, report.reasons) == (45, {})
    run(model, with_reference(name, (3, 5)))
    (reason,) = falloff.report(model).reasons
    assert "not of the image's size, 4x5 tokens" in reason


def test_ids_in_another_order_are_no_grid() -> None:
    ids = torch.cartesian_prod(torch.arange(1), torch.arange(3), torch.arange(4)).float()
    assert grid_of(ids) == (1, 3, 4)
    assert grid_of(ids[None]) == (1, 3, 4)
    assert "row by row" in str(grid_of(ids.flip(0)))


def test_masks_of_samples_with_text_of_their_own_keep_padding_out() -> None:
    """Whatever stands in padded text never reaches the video."""
    for name in ("HunyuanVideo", "HunyuanVideo 1.5", "Mochi", "QwenImage"):
        family = FAMILIES[name]
        model = family.build()
        arguments = family.arguments((1, 4, 5) if family.image else (3, 4, 5), 2)
        falloff.enable(model, tiny.Frames(rows=family.image))
        out = run(model, arguments)
        mask = arguments.get("encoder_attention_mask", arguments.get("encoder_hidden_states_mask")).bool()
        assert not mask.all()
        text = arguments["encoder_hidden_states"]
        if name != "Mochi":  # whose pooled text weighs padding by 0, in a sum that it changes in the last bits
            arguments["encoder_hidden_states"] = torch.where(mask[..., None], text, text + 9.0)
            torch.testing.assert_close(run(model, arguments), out, atol=1e-6, rtol=1e-6)
