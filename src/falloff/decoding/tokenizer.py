"""The image tokenizer LPD decodes into: a VQGAN with few, normalised code dimensions (LlamaGen, arXiv:2406.06525).

Latents and codebook are both scaled to length 1; a latent's code is the nearest row, and decoding uses that row as
scaled. Parameters have the names and shapes of the released ``vq_ds16_c2i``: 16 px to a token, 16384 codes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize, pad, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa


class Residual(nn.Module):
    def __init__(self, channels: int, out: int, groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(channels, groups)
        self.conv1 = _conv(channels, out)
        self.norm2 = _norm(out, groups)
        self.conv2 = _conv(out, out)
        self.nin_shortcut = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        hidden = self.conv1(silu(self.norm1(x_BCHW)))
        hidden = self.conv2(silu(self.norm2(hidden)))
        out: Tensor = self.nin_shortcut(x_BCHW) + hidden
        return out


class Attention(nn.Module):
    """One head over all places of the picture."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        normed = self.norm(x_BCHW)
        q, k, v = (part(normed).flatten(2).mT[:, None] for part in (self.q, self.k, self.v))
        out: Tensor = x_BCHW + self.proj_out(sdpa(q, k, v)[:, 0].mT.reshape(x_BCHW.shape))
        return out


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(pad(x_BCHW, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        out: Tensor = self.conv(interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out


CHANGES: dict[str, type[Downsample] | type[Upsample]] = {"downsample": Downsample, "upsample": Upsample}


class Level(nn.Module):
    """Residual blocks of one resolution, attention after each at the lowest, then the change to the next."""

    def __init__(self, widths: list[int], groups: int, attends: bool, change: str | None) -> None:
        super().__init__()
        self.res = nn.ModuleList(Residual(a, b, groups) for a, b in pairwise(widths))
        self.attn = nn.ModuleList(Attention(widths[-1], groups) for _ in self.res if attends)
        self.change = change
        if change is not None:
            self.add_module(change, CHANGES[change](widths[-1]))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        for i, block in enumerate(self.res):
            x_BCHW = block(x_BCHW)
            if len(self.attn):
                x_BCHW = self.attn[i](x_BCHW)
        if self.change is None:
            return x_BCHW
        out: Tensor = getattr(self, self.change)(x_BCHW)
        return out


class Coder(nn.Module):
    """Encoder or decoder: a convolution, then levels and the middle (in its own order), then a convolution."""

    def __init__(self, widths: list[int], ends: tuple[int, int], blocks: int, groups: int, *, down: bool) -> None:
        """``widths``: into each level and out of the last; ``ends``: channels of what is read and put out."""
        super().__init__()
        levels = []
        for i, (entry, out) in enumerate(pairwise(widths)):
            last = i == len(widths) - 2
            change = None if last else "downsample" if down else "upsample"
            lowest = last if down else i == 0
            levels.append(Level([entry] + [out] * blocks, groups, lowest, change))
        narrow = widths[-1] if down else widths[0]
        self.down = down
        self.conv_in = _conv(ends[0], widths[0])
        self.conv_blocks = nn.ModuleList(levels)
        middle = [Residual(narrow, narrow, groups), Attention(narrow, groups), Residual(narrow, narrow, groups)]
        self.mid = nn.ModuleList(middle)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = _conv(widths[-1], ends[1])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = self.conv_in(x_BCHW)
        parts = [*self.conv_blocks, *self.mid] if self.down else [*self.mid, *self.conv_blocks]
        for part in parts:
            x_BCHW = part(x_BCHW)
        out: Tensor = self.conv_out(silu(self.norm_out(x_BCHW)))
        return out


class Codebook(nn.Module):
    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)
        nn.init.uniform_(self.embedding.weight, -1 / codes, 1 / codes)
        with torch.no_grad():
            self.embedding.weight.copy_(normalize(self.embedding.weight, dim=1))

    def nearest(self, latents_BCHW: Tensor) -> Tensor:
        """Codes int64 [B, H, W]. Of unit vectors the nearest is the one with the largest product."""
        rows = normalize(self.embedding.weight, dim=1)
        return torch.einsum("bchw,kc->bkhw", normalize(latents_BCHW, dim=1), rows).argmax(dim=1)

    def forward(self, codes_BHW: Tensor) -> Tensor:
        """Unit vectors [B, C, H, W]."""
        return normalize(self.embedding(codes_BHW), dim=-1).permute(0, 3, 1, 2)


class VQTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is not typed
    """Images [B, channels, H, W] in [-1, 1] to codes [B, H / f, W / f] and back, f = 2 ** (len(multipliers) - 1).

    width, multipliers: channels of each level from the full resolution down. blocks: residual blocks per level of
    the encoder; the decoder has one more. codes, code_dim: of the codebook. groups: of the group norms.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers is not typed
    def __init__(
        self,
        width: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        latent_channels: int = 256,
        codes: int = 16384,
        code_dim: int = 8,
        channels: int = 3,
        groups: int = 32,
    ) -> None:
        super().__init__()
        falling = [width * m for m in multipliers]
        rising = falling[::-1]
        self.encoder = Coder([width, *falling], (channels, latent_channels), blocks, groups, down=True)
        self.decoder = Coder([rising[0], *rising], (latent_channels, channels), blocks + 1, groups, down=False)
        self.quantize = Codebook(codes, code_dim)
        self.quant_conv = nn.Conv2d(latent_channels, code_dim, 1)
        self.post_quant_conv = nn.Conv2d(code_dim, latent_channels, 1)

    @property
    def factor(self) -> int:
        """Pixels to a token, along each side."""
        return int(2 ** (len(self.config.multipliers) - 1))

    def latents(self, images_BCHW: Tensor) -> Tensor:
        """What is quantised, [B, code_dim, H / f, W / f]. Raises ``ValueError`` for images that do not fit."""
        channels, factor = self.config.channels, self.factor
        height, width = images_BCHW.shape[-2:]
        if images_BCHW.ndim != 4 or images_BCHW.shape[1] != channels or height % factor or width % factor:
            raise ValueError(
                f"images must be [batch, {channels}, height, width] with sides that are multiples of {factor}, "
                f"got {list(images_BCHW.shape)}"
            )
        out: Tensor = self.quant_conv(self.encoder(images_BCHW))
        return out

    @apply_forward_hook  # type: ignore[untyped-decorator]  # diffusers is not typed; brings offloaded weights back
    def encode(self, images_BCHW: Tensor) -> Tensor:
        """Codes int64 [B, H / f, W / f]."""
        return self.quantize.nearest(self.latents(images_BCHW))

    @apply_forward_hook  # type: ignore[untyped-decorator]  # as for encode
    def decode(self, codes_BHW: Tensor) -> Tensor:
        """Images [B, channels, f H, f W], about -1 to 1."""
        return self.decode_latents(self.quantize(codes_BHW))

    def decode_latents(self, latents_BCHW: Tensor) -> Tensor:
        """Images of unit vectors, of a codebook or on their way to one."""
        out: Tensor = self.decoder(self.post_quant_conv(latents_BCHW))
        return out


def _norm(channels: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)
