"""A tiny random HunyuanVideo that begins with a picture; what LLaVA and CLIP would say is made up."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from PIL import Image
from torch import Tensor

PLACES = 8
"""Tokens that the text encoder has for a picture, before some are left out."""


def hunyuan_video(*, beside: bool) -> HunyuanVideoImageToVideoPipeline:
    """With the picture in more channels, or in place of the first latent frame and with distilled guidance."""
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=9 if beside else 4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        pooled_projection_dim=6,
        rope_axes_dim=(4, 4, 4),
        guidance_embeds=not beside,
        image_condition_type="latent_concat" if beside else "token_replace",
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    pipe = HunyuanVideoImageToVideoPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        image_processor=None,
    )
    pipe._get_llama_prompt_embeds, pipe._get_clip_prompt_embeds = _seen, _pooled
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _seen(
    image: Image.Image, prompt: str, *args: Any, max_sequence_length: int, image_embed_interleave: int, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Other numbers for other pictures and prompts, and as many tokens as are kept."""
    kept = PLACES // image_embed_interleave
    numbers = torch.arange(kept + max_sequence_length)[None, :, None] * torch.arange(1, 17) / 16
    shown, told = np.asarray(image).mean() / 255, len(prompt)
    embeds = torch.cat([torch.sin(numbers[:, :kept] + shown), torch.cos(numbers[:, kept:] * shown + told)], dim=1)
    return embeds.float(), (torch.arange(embeds.shape[1])[None] < kept + told).long()


def _pooled(prompt: str, *args: Any, **kwargs: Any) -> Tensor:
    return torch.full((1, 6), len(prompt) / 8)
