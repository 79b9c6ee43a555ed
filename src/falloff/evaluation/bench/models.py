"""Transformers of true size from their configurations alone, with random weights."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from falloff.evaluation.bench.shapes import SHAPES, Shape
from falloff.hosts import host_for

Inputs = dict[str, Tensor]
ACTIVATION_WIDTHS = 16
"""Tensors as wide as the hidden states that a layer holds at once, single precision counted twice."""


@dataclass(frozen=True, kw_only=True)
class TrueModel:
    """A transformer and the size of its work.

    ``config``: what differs from the defaults of diffusers. ``text``: tokens of the prompt.
    """

    shape: Shape
    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    text: int = 512


WAN = "WanTransformer3DModel"
HUNYUAN = "HunyuanVideoTransformer3DModel"
WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}

MODELS: dict[str, TrueModel] = {
    model.shape.name: model
    for model in (  # the defaults of diffusers are Wan2.1-14B's and HunyuanVideo's
        TrueModel(shape=SHAPES["wan1.3b-480p"], kind=WAN, config=WAN_1_3B),
        TrueModel(shape=SHAPES["wan14b-480p"], kind=WAN),
        TrueModel(shape=SHAPES["wan14b-720p"], kind=WAN),
        TrueModel(shape=SHAPES["wan14b-720p-4x"], kind=WAN),
        TrueModel(shape=SHAPES["hunyuan-720p"], kind=HUNYUAN, text=256),
        TrueModel(shape=SHAPES["hunyuan-720p-4x"], kind=HUNYUAN, text=256),
    )
}


def model_of(name: str, known: Mapping[str, TrueModel] = MODELS) -> TrueModel:
    """The model of a name. Raises ``ValueError`` with the known names for another."""
    if name not in known:
        raise ValueError(f"no model for the shape {name!r}; choose one of {', '.join(known)}")
    return known[name]


def on_meta(model: TrueModel) -> nn.Module:
    """The model without memory, to be counted. Raises ``UnsupportedModelError`` for a family that has no host."""
    import diffusers

    with torch.device("meta"):
        made: nn.Module = getattr(diffusers, model.kind)(**model.config)
    host_for(made)
    return made


def bytes_needed(model: TrueModel, dtype: torch.dtype) -> int:
    """Weights, and the activations of one forward, roughly."""
    made = on_meta(model)
    weights = sum(parameter.numel() for parameter in made.parameters())
    widest = max(layer.out_features for layer in made.modules() if isinstance(layer, nn.Linear))
    hidden = ACTIVATION_WIDTHS * model.shape.heads * model.shape.head_dim
    return (weights + model.shape.tokens * (2 * widest + hidden)) * dtype.itemsize


def build(model: TrueModel, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model with random weights, made on the device in ``dtype``; parts that its family keeps in float32 are."""
    import diffusers

    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), _default_dtype(dtype), torch.device(device):
        torch.manual_seed(0)
        made: nn.Module = getattr(diffusers, model.kind)(**model.config)
    exact = set(getattr(made, "_keep_in_fp32_modules", None) or ())
    for name, weight in itertools.chain(made.named_parameters(), made.named_buffers()):
        if exact & set(name.split(".")):
            weight.data = weight.data.float()
    return made.eval().requires_grad_(False)


def inputs(model: TrueModel, made: nn.Module, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Arguments of one forward: random latents and a random prompt of full length, batch size 1."""
    assert model.shape.sequence is not None
    grid = model.shape.sequence.grid
    config: Any = made.config
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    patch, prompt = _FAMILIES[model.kind]
    sides = [n * p for n, p in zip((grid.frames, grid.height, grid.width), patch(config), strict=True)]
    latents = draw(1, config.in_channels, *sides)
    timestep = torch.tensor([500], device=device)
    return {"hidden_states": latents, "timestep": timestep, **prompt(config, model.text, draw)}


class _Family(NamedTuple):
    """The patch (frames, height, width) of a config, and the arguments of a forward that tell the prompt."""

    patch: Callable[[Any], tuple[int, ...]]
    prompt: Callable[[Any, int, Callable[..., Tensor]], Inputs]


def _wan_prompt(config: Any, text: int, draw: Callable[..., Tensor]) -> Inputs:
    return {"encoder_hidden_states": draw(1, text, config.text_dim)}


def _hunyuan_prompt(config: Any, text: int, draw: Callable[..., Tensor]) -> Inputs:
    prompt = draw(1, text, config.text_embed_dim)
    return {
        "encoder_hidden_states": prompt,
        "encoder_attention_mask": torch.ones(1, text, dtype=torch.bool, device=prompt.device),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "guidance": torch.tensor([6000.0], dtype=prompt.dtype, device=prompt.device),
    }


_FAMILIES: dict[str, _Family] = {
    WAN: _Family(lambda config: tuple(config.patch_size), _wan_prompt),
    HUNYUAN: _Family(lambda config: (config.patch_size_t, config.patch_size, config.patch_size), _hunyuan_prompt),
}


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
