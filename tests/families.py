"""A tiny random model of every family, and the arguments of its forward for any grid."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import diffusers
import torch
from packaging.version import Version
from torch import Tensor, nn

installed = Version(diffusers.__version__)
Size = tuple[int, int, int]
TEXT = 8
"""Channels of text embeddings."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """``config`` of a model of ``layers`` self-attention layers; ``inputs(random, grid, batch)`` of a forward.

    ``text`` counts the tokens beside the grid, after it or ``text_first``. Image models take grids of one frame.
    """

    model: str
    config: dict[str, Any]
    inputs: Callable[[Random, Size, int], dict[str, Any]]
    layers: int
    text: int = 0
    text_first: bool = False
    image: bool = False
    least_frames: int = 1
    least_tokens: int = 1
    since: str = "0.35"
    """The first diffusers whose attention of this family can be reached."""

    def build(self, seed: int = 0) -> nn.Module:
        """A model whose random weights are large enough for attention to matter."""
        torch.manual_seed(seed)
        model = getattr(diffusers, self.model)(**self.config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.abs().max() == 0:
                    parameter.normal_(std=0.3)
                elif "to_q" in name or "to_k" in name:
                    parameter.mul_(3.0)
        return model

    def shallow(self) -> Family:
        """The family with as few layers as its class can have one by one."""
        counts = ("num_layers", "num_visual_blocks", "inject_face_latents_blocks")
        return replace(self, config={**self.config, **{name: 1 for name in counts if name in self.config}})

    def arguments(self, grid: Size, batch: int = 1, seed: int = 0, **more: Any) -> dict[str, Any]:
        return {**self.inputs(Random(seed), grid, batch), "return_dict": False, **more}


class Random:
    """Tensors from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def valid(self, batch: int, tokens: int) -> Tensor:
        """Valid tokens first, as many as chance has it, at least one: bool [B, tokens]."""
        counts = torch.randint(1, tokens + 1, (batch, 1), generator=self.generator)
        return torch.arange(tokens) < counts


@cache
def shared(name: str) -> nn.Module:
    """The model of a family for tests that leave it as it was."""
    return FAMILIES[name].build()


def run(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """What a model puts out for every sample, all of it: [B, numbers]."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "In CPU autocast")  # Mochi asks for float32, which the CPU has anyway
        outputs = model(**arguments)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([output.flatten(1) for output in outputs], dim=1)


def _wan(random: Random, grid: Size, batch: int, channels: int = 4) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": random.normal(batch, channels, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random.normal(batch, 3, TEXT),
    }


def _wan_vace(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    control = random.normal(batch, 6, grid[0], 2 * grid[1], 2 * grid[2])
    return {**_wan(random, grid, batch), "control_hidden_states": control}


def _wan_animate(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        **_wan(random, grid, batch, channels=12),
        "pose_hidden_states": random.normal(batch, 4, frames - 1, 2 * height, 2 * width),
        "face_pixel_values": random.normal(batch, 3, 4 * frames - 7, 8, 8),
    }


def _hunyuan_video(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": random.normal(batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "encoder_attention_mask": random.valid(batch, 5).long(),
        "pooled_projections": random.normal(batch, 6),
        "guidance": torch.full((batch,), 6000.0),
    }


def _mochi(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": random.normal(batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "encoder_attention_mask": random.valid(batch, 5),
    }


def _cogvideox(random: Random, grid: Size, batch: int, patch_t: int = 1) -> dict[str, Any]:
    frames, height, width = grid
    tokens = frames * height * width
    return {
        "hidden_states": random.normal(batch, patch_t * frames, 4, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "image_rotary_emb": (random.normal(tokens, 16), random.normal(tokens, 16)),
    }


def _cogvideox_1_5(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    return {**_cogvideox(random, grid, batch, patch_t=2), "ofs": torch.full((1,), 2.0)}


def _allegro(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    rotary = get_3d_rotary_pos_embed_allegro(
        embed_dim=24, crops_coords=((0, 0), (height, width)), grid_size=(height, width), temporal_size=frames
    )
    freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = rotary
    positions = list(torch.cartesian_prod(grid_t, grid_h, grid_w).long().T[:, None])
    return {
        "hidden_states": random.normal(batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random.normal(batch, 1, 5, TEXT),
        "encoder_attention_mask": random.valid(batch, 5).long(),
        "image_rotary_emb": ((freqs_t, freqs_h, freqs_w), positions),
    }


def _hunyuan_video15(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": random.normal(batch, 4, frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random.normal(batch, 4, TEXT),
        "encoder_attention_mask": random.valid(batch, 4),
        "encoder_hidden_states_2": random.normal(batch, 2, TEXT),
        "encoder_attention_mask_2": random.valid(batch, 2),
        "image_embeds": torch.zeros(batch, 1, TEXT),
    }


def _ltx(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": random.normal(batch, frames * height * width, 4),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "encoder_attention_mask": random.valid(batch, 5),
        "num_frames": frames,
        "height": height,
        "width": width,
    }


def _ltx2(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    return {
        **_ltx(random, grid, batch),
        "timestep": torch.full((batch, grid[0] * grid[1] * grid[2]), 500.0),
        "audio_timestep": torch.full((batch,), 500.0),
        "audio_hidden_states": random.normal(batch, 3, 4),
        "audio_encoder_hidden_states": random.normal(batch, 5, TEXT),
        "audio_num_frames": 3,
    }


def _ids(grid: Size, axes: int) -> Tensor:
    frames, height, width = (torch.arange(size) for size in grid)
    ids = torch.cartesian_prod(frames, height, width).float()
    return torch.nn.functional.pad(ids, (0, axes - 3))


def _flux(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(batch, grid[0] * grid[1] * grid[2], 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "pooled_projections": random.normal(batch, 6),
        "txt_ids": torch.zeros(5, 3),
        "img_ids": _ids(grid, 3),
    }


def _flux2(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    inputs = _flux(random, grid, batch)
    del inputs["pooled_projections"]
    ids = {"txt_ids": torch.zeros(batch, 5, 4), "img_ids": _ids(grid, 4).expand(batch, -1, -1)}
    return {**inputs, **ids, "guidance": torch.full((batch,), 4.0)}


def _qwenimage(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": random.normal(batch, grid[0] * grid[1] * grid[2], 4),
        "timestep": torch.full((batch,), 0.5),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "encoder_hidden_states_mask": random.valid(batch, 5),
        "img_shapes": [[grid] for _ in range(batch)],
        **({} if installed >= Version("0.37") else {"txt_seq_lens": [5] * batch}),
    }


def _kandinsky5(random: Random, grid: Size, batch: int) -> dict[str, Any]:
    frames, height, width = grid
    return {
        "hidden_states": random.normal(batch, frames, 2 * height, 2 * width, 4),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": random.normal(batch, 5, TEXT),
        "pooled_projections": random.normal(batch, 6),
        "visual_rope_pos": [torch.arange(size) for size in grid],
        "text_rope_pos": torch.arange(5),
    }


WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 16,
    "num_layers": 2,
    "cross_attn_norm": True,
    "rope_max_seq_len": 32,
}
HUNYUAN_VIDEO = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "mlp_ratio": 1.0,
    "text_embed_dim": TEXT,
    "pooled_projection_dim": 6,
    "rope_axes_dim": (4, 4, 4),
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT,
    "num_layers": 2,
    "use_rotary_positional_embeddings": True,
}
LTX = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "cross_attention_dim": 24,
    "num_layers": 2,
    "caption_channels": TEXT,
}
FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT,
}

ALL = {
    "Wan": Family(model="WanTransformer3DModel", config=WAN, inputs=_wan, layers=2),
    "Wan VACE": Family(
        model="WanVACETransformer3DModel",
        config={**WAN, "vace_layers": [0], "vace_in_channels": 6},
        inputs=_wan_vace,
        layers=3,
    ),
    "Wan Animate": Family(
        model="WanAnimateTransformer3DModel",
        config={
            **WAN,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        inputs=_wan_animate,
        layers=2,
        least_frames=2,
        since="0.36",
    ),
    "SkyReels-V2": Family(model="SkyReelsV2Transformer3DModel", config=WAN, inputs=_wan, layers=2, since="0.36"),
    "HunyuanVideo": Family(
        model="HunyuanVideoTransformer3DModel",
        config=HUNYUAN_VIDEO,
        inputs=_hunyuan_video,
        layers=2,
        text=5,
        since="0.36",
    ),
    "HunyuanVideo I2V": Family(
        model="HunyuanVideoTransformer3DModel",
        config={**HUNYUAN_VIDEO, "image_condition_type": "token_replace"},
        inputs=_hunyuan_video,
        layers=2,
        text=5,
        since="0.36",
    ),
    "Mochi": Family(
        model="MochiTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
        },
        inputs=_mochi,
        layers=2,
        text=5,
    ),
    "CogVideoX": Family(
        model="CogVideoXTransformer3DModel", config=COGVIDEOX, inputs=_cogvideox, layers=2, text=5, text_first=True
    ),
    "CogVideoX 1.5 I2V": Family(
        model="CogVideoXTransformer3DModel",
        config={**COGVIDEOX, "patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8},
        inputs=_cogvideox_1_5,
        layers=2,
        text=5,
        text_first=True,
    ),
    "Allegro": Family(
        model="AllegroTransformer3DModel",
        config={
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "cross_attention_dim": 48,
            "caption_channels": TEXT,
        },
        inputs=_allegro,
        layers=2,
        least_tokens=2,  # it squeezes an axis of one token away
    ),
    "HunyuanVideo 1.5": Family(
        model="HunyuanVideo15Transformer3DModel",
        config={
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "mlp_ratio": 1.0,
            "text_embed_dim": TEXT,
            "text_embed_2_dim": TEXT,
            "image_embed_dim": TEXT,
            "rope_axes_dim": (4, 4, 4),
        },
        inputs=_hunyuan_video15,
        layers=2,
        text=7,
        since="0.36",
    ),
    "LTX": Family(model="LTXVideoTransformer3DModel", config=LTX, inputs=_ltx, layers=2),
    "LTX-2": Family(
        model="LTX2VideoTransformer3DModel",
        config={
            **LTX,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
        },
        inputs=_ltx2,
        layers=2,
        since="0.37",
    ),
    "Kandinsky 5": Family(
        model="Kandinsky5Transformer3DModel",
        config={
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "in_text_dim": TEXT,
            "in_text_dim2": 6,
            "time_dim": 16,
            "model_dim": 32,
            "ff_dim": 32,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 6, 6),
        },
        inputs=_kandinsky5,
        layers=2,
        since="0.36",
    ),
    "FLUX.1": Family(
        model="FluxTransformer2DModel",
        config={**FLUX, "pooled_projection_dim": 6, "axes_dims_rope": (4, 6, 6)},
        inputs=_flux,
        layers=2,
        text=5,
        text_first=True,
        image=True,
    ),
    "FLUX.2": Family(
        model="Flux2Transformer2DModel",
        config={**FLUX, "timestep_guidance_channels": 8, "axes_dims_rope": (4, 4, 4, 4)},
        inputs=_flux2,
        layers=2,
        text=5,
        text_first=True,
        image=True,
        since="0.36",
    ),
    "QwenImage": Family(
        model="QwenImageTransformer2DModel",
        config={
            "in_channels": 4,
            "out_channels": 1,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 6, 6),
        },
        inputs=_qwenimage,
        layers=2,
        text=5,
        text_first=True,
        image=True,
    ),
}
FAMILIES = {name: family for name, family in ALL.items() if installed >= Version(family.since)}
