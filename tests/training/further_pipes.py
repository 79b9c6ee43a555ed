"""Tiny random pipelines that take prompts in words, of families whose text encoders are not Wan's."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLQwenImage,
    ClassifierFreeGuidance,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    ByT5Tokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLTextConfig,
    Qwen2_5_VLTextModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)
from worded import pipeline

CHAT = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def hunyuan_video15(*, image: bool = False) -> Any:
    tokenizer = pipeline().tokenizer
    tokenizer.chat_template = CHAT
    torch.manual_seed(0)
    transformer = HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=16,
        text_embed_2_dim=12,
        image_embed_dim=8,
        rope_axes_dim=(4, 4, 4),
        target_size=32,
    )
    made = (HunyuanVideo15ImageToVideoPipeline if image else HunyuanVideo15Pipeline)(
        tokenizer=tokenizer,
        text_encoder=_qwen(),
        tokenizer_2=ByT5Tokenizer(),
        text_encoder_2=T5EncoderModel(
            T5Config(vocab_size=384, d_model=12, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        ).eval(),
        transformer=transformer.eval(),
        vae=AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(32, 32, 32),
            layers_per_block=1,
            spatial_compression_ratio=4,
        ).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=ClassifierFreeGuidance(guidance_scale=2.0),
        **(_siglip() if image else {}),
    )
    made.system_message, made.prompt_template_encode_start_idx = "a fox", 2
    made.tokenizer_max_length, made.tokenizer_2_max_length = 6, 8
    return _quiet(made)


def allegro() -> AllegroPipeline:
    """For clips of 8 frames of 32 x 32; one that was saved and loaded, of 24 frames of 136 x 136."""
    words = pipeline()
    torch.manual_seed(0)
    transformer = AllegroTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        cross_attention_dim=48,
        caption_channels=16,
        sample_frames=6,
        sample_height=34,
        sample_width=34,
    )
    vae = AutoencoderKLAllegro(
        down_block_types=("AllegroDownBlock3D",) * 3,
        up_block_types=("AllegroUpBlock3D",) * 3,
        block_out_channels=(4, 4, 4),
        temporal_downsample_blocks=(True, True, False),
        temporal_upsample_blocks=(False, True, True),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=136,
    )
    vae.kernel, vae.stride = (8, 32, 32), (4, 16, 16)
    vae.enable_tiling()
    parts = {"tokenizer": words.tokenizer, "text_encoder": words.text_encoder}
    parts["scheduler"] = EulerAncestralDiscreteScheduler()
    return _quiet(AllegroPipeline(**parts, transformer=transformer.eval(), vae=vae.eval()))


def flux() -> FluxPipeline:
    """With distilled guidance, as FLUX.1 dev."""
    words = pipeline()
    words.tokenizer.model_max_length = 8
    torch.manual_seed(0)
    clip = CLIPTextConfig(
        vocab_size=8,
        hidden_size=12,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=3,
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    made = FluxPipeline(
        tokenizer=words.tokenizer,
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer_2=words.tokenizer,
        text_encoder_2=words.text_encoder,
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    return _quiet(made)


def qwen_image() -> QwenImagePipeline:
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.0, 2.0, 1.5],
    )
    made = QwenImagePipeline(
        tokenizer=pipeline().tokenizer,
        text_encoder=_qwen(),
        transformer=transformer.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, max_shift=0.9, shift_terminal=0.02),
    )
    made.prompt_template_encode, made.prompt_template_encode_start_idx = "a fox {}", 1
    return _quiet(made)


def _siglip() -> dict[str, Any]:
    config = SiglipVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    return {
        "image_encoder": SiglipVisionModel(config).eval(),
        "feature_extractor": SiglipImageProcessor(size={"height": 8, "width": 8}),
    }


def _qwen() -> Qwen2_5_VLTextModel:
    config = Qwen2_5_VLTextConfig(
        vocab_size=8,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
    )
    return Qwen2_5_VLTextModel(config).eval()


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
