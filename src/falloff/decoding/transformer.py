"""The transformer of Locality-aware Parallel Decoding (LPD, arXiv:2507.01957): context and queries are separate rows.

Context rows (the class, then image tokens) give keys and values; query rows (one learned vector at the position asked
for) give the logits of that position. Parameters have the names and shapes of the released checkpoints. N tokens in
raster order, D width, V vocabulary; position 0 is the class, position 1 + i is cell i.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

NO_CLASS = -1
"""The label of the unconditional branch."""
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q_BHSD, k_BHSD, v_BHSD) -> out_BHSD: what each row sees is not the transformer's business."""

SIZES: dict[str, dict[str, int]] = {
    "L": {"width": 1024, "layers": 24, "heads": 16},
    "XL": {"width": 1280, "layers": 36, "heads": 20},
    "XXL": {"width": 1536, "layers": 48, "heads": 24},
}
"""The published sizes: ``LPDTransformer(**SIZES["L"])`` has 337 M parameters."""


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        q, k, v = self.qkv(x_BSD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out: Tensor = self.drop(self.proj(attend(q, k, v).transpose(1, 2).flatten(2)))
        return out


class Mlp(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BSD: Tensor) -> Tensor:
        hidden = self.drop(nn.functional.gelu(self.fc1(x_BSD)))
        out: Tensor = self.drop(self.fc2(hidden))
        return out


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width, dropout)

    def forward(self, x_BSD: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD), attend)
        out: Tensor = x_BSD + self.mlp(self.norm2(x_BSD))
        return out


class LPDTransformer(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers is not typed
    """A class-conditional image-token model whose tokens may be asked for in any order and number.

    width, layers, heads: of the transformer. grid_height, grid_width: of the tokens. vocabulary: of the tokenizer.
    classes: labels are 0 to ``classes - 1``, and ``NO_CLASS``. dropout: after attention, inside and after the MLP.
    """

    _no_split_modules = ["Block"]  # noqa: RUF012 - diffusers reads a list

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers is not typed
    def __init__(
        self,
        width: int = 1024,
        layers: int = 24,
        heads: int = 16,
        grid_height: int = 16,
        grid_width: int = 16,
        vocabulary: int = 16384,
        classes: int = 1000,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width = {width} is not a multiple of heads = {heads}")
        self.tokens = grid_height * grid_width
        self.class_emb = nn.Embedding(classes, width)
        self.token_emb = nn.Embedding(vocabulary, width)
        self.fake_latent = nn.Parameter(torch.empty(1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.tokens, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.z_proj_ln = nn.LayerNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self._initialise()

    def _initialise(self) -> None:
        for weight in (
            self.class_emb.weight,
            self.token_emb.weight,
            self.fake_latent,
            self.pos_embed,
            self.mask_token,
        ):
            nn.init.normal_(weight, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, labels_B: Tensor | None, tokens_BP: Tensor, cells_BP: Tensor, asked_BG: Tensor, attend: Attend
    ) -> Tensor:
        """Logits [B, G, V] of the raster cells asked for.

        Rows are, in this order: the class where ``labels_B`` are given (``NO_CLASS`` is legal), the tokens at their
        cells, and a query for each cell asked for. One pass serves a step of decoding and a whole training sample.
        """
        rows = [self._placed(self.token_emb(tokens_BP), cells_BP), self._placed(self.mask_token, asked_BG)]
        if labels_B is not None:
            rows.insert(0, self._classes(labels_B))
        x_BSD = torch.cat(rows, dim=1)
        for layer, block in enumerate(self.blocks):
            x_BSD = block(x_BSD, partial(attend, layer))
        out: Tensor = self.head(self.norm(x_BSD[:, x_BSD.shape[1] - asked_BG.shape[1] :]))
        return out

    def _classes(self, labels_B: Tensor) -> Tensor:
        known = self.class_emb(labels_B.clamp(min=0))
        rows = torch.where((labels_B == NO_CLASS)[:, None], self.fake_latent, known)
        return self._placed(rows[:, None], torch.full_like(labels_B, -1)[:, None])

    def _placed(self, rows: Tensor, cells_BS: Tensor) -> Tensor:
        """Position 0 is the class's, hence cell -1."""
        out: Tensor = self.z_proj_ln(rows + self.pos_embed[0][cells_BS + 1])
        return out

    def check_labels(self, labels_B: Tensor) -> None:
        """Raise ``ValueError`` for labels that are no class of the model."""
        wrong = labels_B[(labels_B < 0) | (labels_B >= self.config.classes)]
        if len(wrong):
            raise ValueError(f"the model has classes 0 to {self.config.classes - 1}, got {wrong.tolist()}")


def resized_positions(pos_embed: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A checkpoint's positions [1, 1 + h w, D] for another grid, bicubic; the class keeps its own."""
    if pos_embed.shape[1] != 1 + old[0] * old[1]:
        raise ValueError(f"positions of a {old[0]} x {old[1]} grid are 1 + {old[0] * old[1]}, got {pos_embed.shape[1]}")
    picture = pos_embed[:, 1:].reshape(1, *old, -1).permute(0, 3, 1, 2)
    options: dict[str, Any] = {"size": new, "mode": "bicubic", "align_corners": False}
    resized = nn.functional.interpolate(picture, **options).permute(0, 2, 3, 1).flatten(1, 2)
    return torch.cat([pos_embed[:, :1], resized], dim=1)
