"""FLUX.1, FLUX.2 and Qwen-Image from text: a picture is a clip of one frame, whose latents are packed two by two."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from falloff.training.family import Call, Family, Sample, Text, normalised, shifted_by_size


def _packed(pipe: Any, latents: Tensor) -> Tensor:
    """[1, C, 1, H, W] as tokens [1, H W / 4, 4 C]."""
    _, channels, _, height, width = latents.shape
    packed: Tensor = pipe._pack_latents(latents[:, :, 0], 1, channels, height, width)
    return packed


def _tokens(pipe: Any, call: Call) -> int:
    step = 2 * pipe.vae_scale_factor
    tokens: int = (call["height"] // step) * (call["width"] // step)
    return tokens


def _timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    return shifted_by_size(pipe.scheduler, _tokens(pipe, call), steps)


def _unfit(pipe: Any, call: Call) -> str | None:
    step = 2 * pipe.vae_scale_factor
    if call["height"] % step or call["width"] % step:
        return f"height = {call['height']} and width = {call['width']} have to be multiples of {step}"
    return None


def _flux_latents(pipe: Any, latents: Tensor) -> Tensor:
    config = pipe.vae.config
    return _packed(pipe, (latents - config.shift_factor) * config.scaling_factor)


def _flux_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 512)
    embeds, pooled, ids = pipe.encode_prompt(caption, None, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "txt_ids": ids}


def _flux_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The guidance only where it was distilled into the model."""
    _, height, width = sample.size
    places = pipe._prepare_latent_image_ids(1, height // 2, width // 2, noised.device, noised.dtype)
    inputs = {"hidden_states": noised, "timestep": level, "img_ids": places}
    if pipe.transformer.config.guidance_embeds:
        inputs["guidance"] = torch.full_like(level, call.get("guidance_scale", 3.5))
    return inputs


FLUX = Family(
    pipelines=("FluxPipeline",),
    temporal=lambda pipe: 1,
    encode=lambda vae, video: vae.encode(video[:, :, 0]).latent_dist.mode()[:, :, None],
    latents=_flux_latents,
    text=_flux_text,
    inputs=_flux_inputs,
    timetable=_timetable,
    unfit=_unfit,
)


def _flux2_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Packed first, and normalised then by the statistics of a batch norm."""
    vae, patched = pipe.vae, pipe._patchify_latents(latents[:, :, 0])
    mean, variance = (x.to(patched).view(1, -1, 1, 1) for x in (vae.bn.running_mean, vae.bn.running_var))
    packed: Tensor = pipe._pack_latents((patched - mean) / (variance + vae.config.batch_norm_eps).sqrt())
    return packed


def _flux2_text(pipe: Any, caption: str, call: Call) -> Text:
    """Of several layers of a language model, which are the pipeline's own choice unless the call's."""
    asked = {name: call[name] for name in ("max_sequence_length", "text_encoder_out_layers") if name in call}
    embeds, ids = pipe.encode_prompt(caption, **asked)
    return {"encoder_hidden_states": embeds, "txt_ids": ids}


def _flux2_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The guidance only where it was distilled into the model, which klein has not."""
    _, height, width = sample.size
    places = pipe._prepare_latent_ids(noised.new_empty(1, 1, height // 2, width // 2)).to(noised.device)
    inputs = {"hidden_states": noised, "timestep": level, "img_ids": places}
    if pipe.transformer.config.guidance_embeds:
        inputs["guidance"] = torch.full_like(level, call.get("guidance_scale", 4.0))
    return inputs


def _flux2_timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    """Shifted for the number of steps besides that of tokens."""
    from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

    return {**_timetable(pipe, steps, call), "mu": compute_empirical_mu(_tokens(pipe, call), steps)}


FLUX2 = replace(
    FLUX,
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    latents=_flux2_latents,
    text=_flux2_text,
    inputs=_flux2_inputs,
    timetable=_flux2_timetable,
)


def _qwen_text(pipe: Any, caption: str, call: Call) -> Text:
    """A mask only where some tokens are padding, of which a single caption has none."""
    embeds, mask = pipe.encode_prompt(caption, max_sequence_length=call.get("max_sequence_length", 512))
    return {"encoder_hidden_states": embeds, **({} if mask is None else {"encoder_hidden_states_mask": mask})}


def _qwen_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    _, height, width = sample.size
    return {"hidden_states": noised, "timestep": level, "img_shapes": [[(1, height // 2, width // 2)]]}


def _qwen_refuse(pipe: Any) -> str | None:
    return (
        "its guidance is distilled, at a scale that is not known" if pipe.transformer.config.guidance_embeds else None
    )


QWEN_IMAGE = replace(
    FLUX,
    pipelines=("QwenImagePipeline",),
    encode=lambda vae, video: vae.encode(video).latent_dist.mode(),
    latents=lambda pipe, latents: _packed(pipe, normalised(latents, pipe.vae.config)),
    text=_qwen_text,
    inputs=_qwen_inputs,
    refuse=_qwen_refuse,
)
