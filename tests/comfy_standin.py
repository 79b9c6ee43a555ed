"""ComfyUI as far as a MODEL's patches see it: its patcher, wrappers, attention override, sampler loop and models.

Small models with ComfyUI's calling conventions: attention is called with flat or with split heads, forwards run
inside wrappers with positional arguments, and blocks tell where they are through ``transformer_options``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HEADS, DIM = 2, 24
TEXT = 5


def attention_plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """The attention that overrides stand for."""
    if not skip_reshape:
        q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kwargs.get("scale"))
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


def optimized_attention(*args: Any, **kwargs: Any) -> Tensor:
    """What models call: the override of ``transformer_options`` when there is one."""
    override = (kwargs.get("transformer_options") or {}).get("optimized_attention_override")
    kwargs["_inside_attn_wrapper"] = True
    return override(attention_plain, *args, **kwargs) if override else attention_plain(*args, **kwargs)


class Executor:
    """A forward inside its wrappers, the first of them outermost."""

    def __init__(self, original: Callable[..., Any], class_obj: Any, wrappers: Sequence[Callable[..., Any]]) -> None:
        self.original, self.class_obj, self.wrappers = original, class_obj, list(wrappers)

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        inner = Executor(self.original, self.class_obj, self.wrappers[1:])
        return self.wrappers[0](inner, *args, **kwargs)

    __call__ = execute


def wrapped(model: Any, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    wrappers = [w for key in options.get("wrappers", {}).get("diffusion_model", {}).values() for w in key]
    return Executor(model._forward, model, wrappers).execute(*args, **kwargs)


class Layer(nn.Module):
    """Self-attention over x, then cross-attention to text where there is some."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.text = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, 2 * DIM)

    def forward(
        self, x: Tensor, text: Tensor | None, options: dict[str, Any], *, split: bool, mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = self.qkv(2 * nn.functional.layer_norm(x, (DIM,))).chunk(3, dim=-1)
        if split:
            q, k, v = (part.unflatten(2, (HEADS, -1)).transpose(1, 2) for part in (q, k, v))
            x = x + optimized_attention(q, k, v, HEADS, mask, skip_reshape=True, transformer_options=options)
        else:
            x = x + optimized_attention(q, k, v, heads=HEADS, transformer_options=options)
        if text is None:
            return x
        k, v = self.text(text).chunk(2, dim=-1)
        return x + optimized_attention(x, k, v, heads=HEADS, transformer_options=options)


def patches(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Mean of every patch of [B, C, F, H, W], padded to whole ones: [B, C, f, h, w]."""
    pad = [p for s, n in zip(reversed(x.shape[2:]), reversed(size), strict=True) for p in (0, -s % n)]
    return nn.functional.avg_pool3d(nn.functional.pad(x, pad), size)


class WanModel(nn.Module):
    """Flat heads; video alone in self-attention."""

    patch_size = (1, 2, 2)

    def __init__(self, layers: int = 2, told: bool = True) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Layer() for _ in range(layers)])
        self.told = told

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006  # as ComfyUI has it
        **kwargs: Any,
    ) -> Tensor:
        options = transformer_options
        return wrapped(self, options, x, timestep, context, clip_fea, time_dim_concat, options, **kwargs)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        clip_fea: Tensor | None = None,
        time_dim_concat: Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as ComfyUI has it
        **kwargs: Any,
    ) -> Tensor:
        if time_dim_concat is not None:
            x = torch.cat([x, time_dim_concat], dim=2)
        tokens = patches(x, self.patch_size).flatten(2).transpose(1, 2)
        for index, block in enumerate(self.blocks):
            if self.told:
                transformer_options.update(block_index=index, total_blocks=len(self.blocks), block_type="double")
            tokens = block(tokens, context, transformer_options, split=False)
        return tokens


class CameraWanModel(WanModel):
    """One of ComfyUI's kinds of Wan."""


class HunyuanVideo(nn.Module):
    """Split heads; video, then text. A refiner attends to text alone first."""

    patch_size = (1, 2, 2)

    def __init__(self) -> None:
        super().__init__()
        self.refiner = Layer()
        self.double_blocks = nn.ModuleList([Layer()])
        self.single_blocks = nn.ModuleList([Layer(), Layer()])

    def forward(
        self, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, transformer_options: dict[str, Any]
    ) -> Tensor:
        return wrapped(self, transformer_options, x, timestep, context, *args, transformer_options=transformer_options)

    def _forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor,
        attention_mask: Tensor | None = None,
        ref_latent: Tensor | None = None,
        transformer_options: dict[str, Any] = {},  # noqa: B006 - as ComfyUI has it
    ) -> Tensor:
        text = self.refiner(context, None, transformer_options, split=True)
        video = [
            patches(part, tuple(self.patch_size)).flatten(2).transpose(1, 2)
            for part in (ref_latent, x)
            if part is not None
        ]
        tokens = torch.cat([*video, text], dim=1)
        for kind in ("double", "single"):
            blocks = getattr(self, f"{kind}_blocks")
            for index, block in enumerate(blocks):
                transformer_options.update(block_index=index, total_blocks=len(blocks), block_type=kind)
                tokens = block(tokens, None, transformer_options, split=True, mask=attention_mask)
        return tokens


class Flux(nn.Module):
    """A model that falloff does not serve in ComfyUI."""


class ModelPatcher:
    """MODEL: a model, and the patches that its clones do not share."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        self.diffusion_model = diffusion_model
        self.model_options: dict[str, Any] = {"transformer_options": {}}
        self.wrappers: dict[str, dict[str, list[Any]]] = {}

    def clone(self) -> ModelPatcher:
        twin = ModelPatcher(self.diffusion_model)
        twin.model_options = {"transformer_options": dict(self.model_options["transformer_options"])}
        twin.wrappers = {kind: {key: list(w) for key, w in keys.items()} for kind, keys in self.wrappers.items()}
        return twin

    def get_model_object(self, name: str) -> nn.Module:
        assert name == "diffusion_model"
        return self.diffusion_model

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])


def model(diffusion_model: Callable[[], nn.Module] = WanModel) -> ModelPatcher:
    torch.manual_seed(0)
    return ModelPatcher(diffusion_model().eval())


def levels(steps: int = 4) -> Tensor:
    return torch.linspace(1, 0, steps + 1)


def sample(
    model: ModelPatcher,
    sigmas: Tensor,
    *args: Any,
    latent: tuple[int, int, int] = (3, 8, 8),
    parts: Sequence[Sequence[int]] = ((1, 0),),
    at: Sequence[float] | None = None,
    **kwargs: Any,
) -> Tensor:
    """The outputs of a run's forwards: one for each of ``parts`` (``cond_or_uncond``) at each noise level."""
    generator = torch.Generator().manual_seed(0)
    outs = []
    for level in sigmas[:-1] if at is None else torch.tensor(at):
        for part in parts:
            batch = len(part)
            x = torch.randn(batch, DIM, *latent, generator=generator)
            options = copy.copy(model.model_options["transformer_options"])
            options.update(wrappers=model.wrappers, sample_sigmas=sigmas, sigmas=level[None], cond_or_uncond=list(part))
            context = torch.randn(batch, TEXT, DIM, generator=generator)
            with torch.no_grad():
                out = model.diffusion_model(
                    x, level.expand(batch), context, *args, transformer_options=options, **kwargs
                )
            outs.append(out)
    return torch.cat(outs)
