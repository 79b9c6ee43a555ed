"""How each family of pipelines trains: what its transformer is given, and what it is to put out for a noised latent.

They differ in how latents are normalised, how text goes in, how the noise level s in 0 to 1 is told, in the sign of the
velocity, and in the path that leads from the clip to noise. Every file of diffusers' pipelines does this backwards;
tests hold the arguments made here against those a pipeline makes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from falloff.hosts import host_for
from falloff.training.errors import TrainingError
from falloff.training.family import Call, Family, Sample, Text, normalised


def _wan_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 512)
    embeds, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds}


def _wan_boundary(pipe: Any) -> float:
    """Of the two experts of Wan 2.2 A14B: the first denoises from here on upwards, the second below."""
    return float(pipe.config.get("boundary_ratio") or 0.0)


def _wan_refuse(pipe: Any) -> str | None:
    missing = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is None]
    if "transformer" in missing or (missing and _wan_boundary(pipe)):
        return f"its boundary_ratio is {pipe.config.get('boundary_ratio')} and it has no {missing[0]}; load all of it"
    return None


WAN = Family(
    pipelines=("WanPipeline", "SkyReelsV2Pipeline"),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: normalised(latents, pipe.vae.config),
    text=_wan_text,
    inputs=lambda pipe, noised, level, sample, call: {"hidden_states": noised, "timestep": 1000 * level},
    boundary=_wan_boundary,
    refuse=_wan_refuse,
)


def _wan_image(pipe: Any, picture: Image, call: Call) -> Text:
    """The picture as latents, with a mask beside them unless it takes the first frame's place; and as seen by CLIP
    where the transformer is told so (Wan 2.1)."""
    height, width, device = call["height"], call["width"], pipe._execution_device
    pixels = pipe.video_processor.preprocess(picture, height=height, width=width)
    _, condition, *_ = pipe.prepare_latents(
        pixels.to(device, torch.float32),
        batch_size=1,
        num_channels_latents=pipe.vae.config.z_dim,
        height=height,
        width=width,
        num_frames=call["num_frames"],
        dtype=torch.float32,
        device=device,
        latents=torch.zeros((), device=device),  # of no concern: only what comes of the picture is kept
    )
    seen = {}
    if pipe.transformer.config.image_dim is not None:
        seen["encoder_hidden_states_image"] = pipe.encode_image(picture, device)
    return {"condition": condition, **seen}


def _wan_image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """More channels for the picture; or, in Wan 2.2 5B, its latents in place of the first frame, at noise level 0."""
    image = {name: x.to(noised) for name, x in sample.image.items()}
    condition = image.pop("condition")
    if not pipe.config.get("expand_timesteps"):
        return {"hidden_states": torch.cat([noised, condition], dim=1), "timestep": 1000 * level, **image}
    _, tall, wide = pipe.transformer.config.patch_size
    frames, height, width = sample.size
    levels = level.repeat(frames, height // tall, width // wide)
    levels[:1] = 0
    hidden = torch.cat([condition, noised[:, :, 1:]], dim=2)
    return {"hidden_states": hidden, "timestep": 1000 * levels.flatten()[None], **image}


WAN_IMAGE = replace(
    WAN,
    pipelines=("WanImageToVideoPipeline", "SkyReelsV2ImageToVideoPipeline"),
    inputs=_wan_image_inputs,
    image=_wan_image,
    given=lambda pipe: int(bool(pipe.config.get("expand_timesteps"))),
)


def _hunyuan_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 256)
    embeds, pooled, mask = pipe.encode_prompt(caption, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "encoder_attention_mask": mask}


def _hunyuan_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The guidance that was distilled into the model is told as in inference."""
    guidance = torch.full_like(level, 1000 * call.get("guidance_scale", 6.0))
    return {"hidden_states": noised, "timestep": 1000 * level, "guidance": guidance.to(noised.dtype)}


HUNYUAN_VIDEO = Family(
    pipelines=("HunyuanVideoPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: latents * pipe.vae.config.scaling_factor,
    text=_hunyuan_text,
    inputs=_hunyuan_inputs,
    timetable=lambda pipe, steps, call: {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1]},
)


def _mochi_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 256)
    embeds, mask, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _mochi_timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    from diffusers.pipelines.mochi.pipeline_mochi import linear_quadratic_schedule

    return {"sigmas": np.array(linear_quadratic_schedule(steps, 0.025))}


MOCHI = Family(  # tells the share of the video, not of noise, and moves towards the video
    pipelines=("MochiPipeline",),
    temporal=lambda pipe: int(pipe.vae_temporal_scale_factor),
    latents=lambda pipe, latents: normalised(latents, pipe.vae.config, pipe.vae.config.scaling_factor),
    text=_mochi_text,
    inputs=lambda pipe, noised, level, sample, call: {"hidden_states": noised, "timestep": 1000 * (1 - level)},
    velocity=-1,
    timetable=_mochi_timetable,
)


def _ltx_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 128)
    embeds, mask, *_ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _ltx_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Normalised and packed into tokens, [1, N, C]."""
    vae = pipe.vae
    normal = pipe._normalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    packed: Tensor = pipe._pack_latents(
        normal, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
    )
    return packed


def _ltx_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    frames, height, width = sample.size
    spatial = pipe.vae_spatial_compression_ratio
    scale = (pipe.vae_temporal_compression_ratio / call.get("frame_rate", 25), spatial, spatial)
    return {
        "hidden_states": noised,
        "timestep": 1000 * level,
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": scale,
    }


def _ltx_timetable(pipe: Any, steps: int, call: Call) -> dict[str, Any]:
    """Levels are shifted more for more tokens, along a line between two sizes."""
    config, spatial = pipe.scheduler.config, pipe.vae_spatial_compression_ratio
    frames = (call["num_frames"] - 1) // pipe.vae_temporal_compression_ratio + 1
    tokens = frames * (call["height"] // spatial) * (call["width"] // spatial)
    few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    mu = least + (most - least) * (tokens - few) / (many - few)
    return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}


LTX = Family(
    pipelines=("LTXPipeline",),
    temporal=lambda pipe: int(pipe.vae_temporal_compression_ratio),
    latents=_ltx_latents,
    text=_ltx_text,
    inputs=_ltx_inputs,
    timetable=_ltx_timetable,
)


def _ltx_image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The clip's own first latent frame, which is all that a causal encoder makes of its picture, at noise level 0."""
    first = noised.shape[1] // sample.size[0]
    levels = level.repeat(1, noised.shape[1])
    levels[:, :first] = 0
    hidden = torch.cat([sample.latents[:, :first].to(noised), noised[:, first:]], dim=1)
    return {**_ltx_inputs(pipe, hidden, level, sample, call), "timestep": 1000 * levels}


LTX_IMAGE = replace(
    LTX,
    pipelines=("LTXImageToVideoPipeline",),
    inputs=_ltx_image_inputs,
    image=lambda pipe, picture, call: {},
    given=lambda pipe: 1,
)


def _cogvideox_latents(pipe: Any, latents: Tensor) -> Tensor:
    """Frames before channels; where frames are patched too, the first is repeated until they can be."""
    scaled = (latents * pipe.vae.config.scaling_factor).transpose(1, 2)
    more = -scaled.shape[1] % (pipe.transformer.config.get("patch_size_t") or 1)
    return torch.cat([*[scaled[:, :1]] * more, scaled], dim=1)


def _cogvideox_text(pipe: Any, caption: str, call: Call) -> Text:
    length = call.get("max_sequence_length", 226)
    embeds, _ = pipe.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=length)
    return {"encoder_hidden_states": embeds}


def _cogvideox_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """The step of the scheduler's table is told, and the positions where they are not learned."""
    last = pipe.scheduler.config.num_train_timesteps - 1
    inputs = {"hidden_states": noised, "timestep": (last * level).round().long()}
    if pipe.transformer.config.use_rotary_positional_embeddings:
        positions = pipe._prepare_rotary_positional_embeddings
        inputs["image_rotary_emb"] = positions(call["height"], call["width"], noised.shape[1], noised.device)
    return inputs


COGVIDEOX = Family(
    pipelines=("CogVideoXPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=_cogvideox_latents,
    text=_cogvideox_text,
    inputs=_cogvideox_inputs,
    diffuses=True,
)


def _cogvideox_image(pipe: Any, picture: Image, call: Call) -> Text:
    """The picture as latents, and nothing for later frames. The pipeline draws them, which is done once for a clip."""
    height, width, device = call["height"], call["width"], pipe._execution_device
    latent = (call["num_frames"] - 1) // pipe.vae_scale_factor_temporal + 1
    more = -latent % (pipe.transformer.config.get("patch_size_t") or 1)
    pixels = pipe.video_processor.preprocess(picture, height=height, width=width)
    _, condition = pipe.prepare_latents(
        pixels.to(device, pipe.vae.dtype),
        num_channels_latents=pipe.transformer.config.in_channels // 2,
        num_frames=call["num_frames"] + more * pipe.vae_scale_factor_temporal,
        height=height,
        width=width,
        dtype=torch.float32,
        device=device,
        generator=torch.Generator().manual_seed(0),
        latents=torch.zeros((), device=device),  # of no concern: only what comes of the picture is kept
    )
    return {"condition": condition}


def _cogvideox_image_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """More channels for the picture, and in 1.5 a number that is always the same."""
    inputs = _cogvideox_inputs(pipe, noised, level, sample, call)
    inputs["hidden_states"] = torch.cat([noised, sample.image["condition"].to(noised)], dim=2)
    if pipe.transformer.config.ofs_embed_dim is not None:
        inputs["ofs"] = noised.new_full((1,), 2.0)
    return inputs


COGVIDEOX_IMAGE = replace(
    COGVIDEOX, pipelines=("CogVideoXImageToVideoPipeline",), inputs=_cogvideox_image_inputs, image=_cogvideox_image
)


def _kandinsky_text(pipe: Any, caption: str, call: Call) -> Text:
    embeds, pooled, lengths = pipe.encode_prompt(caption, max_sequence_length=call.get("max_sequence_length", 512))
    positions = torch.arange(int(lengths.diff().max()), device=embeds.device)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled, "text_rope_pos": positions}


def _kandinsky_inputs(pipe: Any, noised: Tensor, level: Tensor, sample: Sample, call: Call) -> dict[str, Any]:
    """Channels last; those for a picture, where the model has them, are empty."""
    frames, height, width = sample.size
    _, tall, wide = pipe.transformer.config.patch_size
    empty = [torch.zeros_like(noised), torch.zeros_like(noised[..., :1])] if pipe.transformer.visual_cond else []
    return {
        "hidden_states": torch.cat([noised, *empty], dim=-1),
        "timestep": (1000 * level).to(noised.dtype),
        "visual_rope_pos": [torch.arange(n, device=noised.device) for n in (frames, height // tall, width // wide)],
        "scale_factor": pipe._get_scale_factor(call["height"], call["width"]),
    }


KANDINSKY = Family(
    pipelines=("Kandinsky5T2VPipeline",),
    temporal=lambda pipe: int(pipe.vae_scale_factor_temporal),
    latents=lambda pipe, latents: (latents * pipe.vae.config.scaling_factor).permute(0, 2, 3, 4, 1),
    text=_kandinsky_text,
    inputs=_kandinsky_inputs,
    refuse=lambda pipe: host_for(pipe.transformer).refuse(pipe.transformer.config),
)

FAMILIES = (WAN, WAN_IMAGE, HUNYUAN_VIDEO, MOCHI, LTX, LTX_IMAGE, COGVIDEOX, COGVIDEOX_IMAGE, KANDINSKY)


def family_of(pipe: Any) -> Family:
    """Raises ``TrainingError`` for a pipeline that cannot be trained here, with the reason."""
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            if (reason := family.refuse(pipe)) is not None:
                raise TrainingError(f"this {name} cannot be trained: {reason}")
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise TrainingError(f"{name} cannot be trained here; the pipelines that can are {known}")
