"""A tiny random CogVideoX that takes prompts in words."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from worded import pipeline


def cogvideox(*, patched_frames: bool = False, image: bool = False) -> Any:
    """Of 9 frames of 32 x 32; with two frames to a patch as version 1.5, and from an image, where asked for."""
    words = pipeline()
    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        max_text_seq_length=8,
        num_layers=2,
        sample_height=4,
        sample_width=4,
        sample_frames=9,
        use_rotary_positional_embeddings=True,
        **({"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8 if image else None} if patched_frames else {}),
    )
    vae = AutoencoderKLCogVideoX(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
    )
    parts = {"tokenizer": words.tokenizer, "text_encoder": words.text_encoder, "scheduler": scheduler}
    kind = CogVideoXImageToVideoPipeline if image else CogVideoXPipeline
    made = kind(**parts, transformer=transformer.eval(), vae=vae.eval())
    made.set_progress_bar_config(disable=True)
    return made
