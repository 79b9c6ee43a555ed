"""Tiny random Wan pipelines that run in about a second, prompts given as embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image
from torch import Tensor

from falloff import BlockMap, Method, Plan, Schedule
from falloff.methods import Call, State

TEXT = 16
ALWAYS = Schedule(dense_first=0, dense_last=0, dense_layers=())
"""Nothing stays dense."""


@dataclass(frozen=True, kw_only=True)
class Frames(Method):
    """A query sees its own frame, the first ``seen`` frames and text; all of them make full attention.

    Rows of a frame take the frames' place when ``rows`` is set, for grids of one frame.
    """

    name: ClassVar[str] = "frames"
    static: ClassVar[bool] = True
    schedule: ClassVar[Schedule] = ALWAYS

    seen: int = 1
    rows: bool = False

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        sequence, grid = call.sequence, call.sequence.grid
        count, size = (grid.frames * grid.height, grid.width) if self.rows else (grid.frames, grid.frame_tokens)
        blocks = torch.eye(count, dtype=torch.bool)
        blocks[:, : self.seen] = True
        sizes = [size] * count
        if sequence.text:
            place = 0 if sequence.text_side == "before" else count
            sizes.insert(place, sequence.text)
            whole = torch.ones(count + 1, count + 1, dtype=torch.bool)
            video = torch.arange(count + 1) != place
            whole[video.nonzero(), video.nonzero()[:, 0]] = blocks
            blocks = whole
        n, each = sequence.tokens, torch.tensor(sizes)
        return Plan(q_len=n, kv_len=n, q_sizes=each, kv_sizes=each, blocks=BlockMap.from_dense(blocks))


@dataclass(frozen=True, kw_only=True)
class Band(Method):
    """Blocks of ``block`` tokens, whatever they are, that see themselves and their neighbours."""

    name: ClassVar[str] = "band"
    static: ClassVar[bool] = True
    schedule: ClassVar[Schedule] = ALWAYS

    block: int = 32

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        n = call.sequence.tokens
        place = torch.arange(-(-n // self.block))
        blocks = BlockMap.from_dense((place[:, None] - place).abs() <= 1)
        return Plan(q_len=n, kv_len=n, q_sizes=self.block, kv_sizes=self.block, blocks=blocks)


FULL = Frames(seen=99)
"""Every block on; through our kernels where one is named."""


def transformer(layers: int = 2, seed: int = 0, channels: int = 16, out_channels: int = 16) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=channels,
        out_channels=out_channels,
        text_dim=TEXT,
        freq_dim=16,
        ffn_dim=32,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    return model.eval()


def vae(seed: int = 0) -> AutoencoderKLWan:
    torch.manual_seed(seed)
    return AutoencoderKLWan(
        base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def scheduler(name: str = "unipc") -> Any:
    if name == "euler":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)


def t2v(layers: int = 2, experts: int = 1, scheduler_name: str = "unipc", **config: Any) -> WanPipeline:
    """Text to video; two experts switch in the middle of the noise."""
    two = experts == 2
    return _quiet(
        WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae(),
            scheduler=scheduler(scheduler_name),
            transformer=transformer(layers),
            transformer_2=transformer(layers, seed=1) if two else None,
            boundary_ratio=0.8 if two else None,
            **config,
        )
    )


def i2v(layers: int = 2) -> WanImageToVideoPipeline:
    """Image to video, the image as extra channels (Wan 2.2)."""
    return _quiet(
        WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            image_encoder=None,
            image_processor=None,
            vae=vae(),
            scheduler=scheduler(),
            transformer=transformer(layers, channels=36),
            transformer_2=transformer(layers, seed=1, channels=36),
            boundary_ratio=0.8,
        )
    )


def v2v(layers: int = 2) -> WanVideoToVideoPipeline:
    return _quiet(
        WanVideoToVideoPipeline(
            tokenizer=None, text_encoder=None, vae=vae(), scheduler=scheduler(), transformer=transformer(layers)
        )
    )


def generate(
    pipe: Any, *, steps: int = 4, frames: int = 9, size: int = 64, guidance: float = 5.0, **more: Any
) -> Tensor:
    """The latent video of a run from seed 0: a grid of (frames + 3) / 4 x size / 16 x size / 16."""
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 1, 4, TEXT, generator=generator)
    arguments: dict[str, Any] = {
        "num_inference_steps": steps,
        "guidance_scale": guidance,
        "height": size,
        "width": size,
    }
    if isinstance(pipe, WanVideoToVideoPipeline):
        arguments["video"] = [Image.new("RGB", (size, size), (40 * i % 255, 90, 30)) for i in range(frames)]
    else:
        arguments["num_frames"] = frames
    if isinstance(pipe, WanImageToVideoPipeline):
        arguments["image"] = Image.new("RGB", (size, size), (200, 90, 30))
    out = pipe(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1],
        generator=generator,
        output_type="latent",
        **{**arguments, **more},
    )
    frames_BCFHW: Tensor = out.frames
    return frames_BCFHW


def inputs(
    grid: tuple[int, int, int] = (3, 4, 4), batch: int = 1, channels: int = 16, seed: int = 0
) -> dict[str, Tensor]:
    """Arguments of one forward of ``transformer()`` on a token grid."""
    generator = torch.Generator().manual_seed(seed)
    frames, height, width = grid
    return {
        "hidden_states": torch.randn(batch, channels, frames, 2 * height, 2 * width, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 4, TEXT, generator=generator),
    }


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
