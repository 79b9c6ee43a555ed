"""Tiny random models whose logits depend clearly on everything they see."""

import torch

from falloff.decoding.layout import attending, dense_mask, group_ids
from falloff.decoding.tokenizer import VQTokenizer
from falloff.decoding.transformer import LPDTransformer

HEIGHT, WIDTH, VOCABULARY, CLASSES = 3, 5, 11, 4
TOKENS = HEIGHT * WIDTH
SIZES = (1, 2, 3, 4, 5)


def seed(number: int) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def model(dtype: torch.dtype = torch.float64, **changes: int | float) -> LPDTransformer:
    config = {
        "width": 32,
        "layers": 2,
        "heads": 4,
        "grid_height": HEIGHT,
        "grid_width": WIDTH,
        "vocabulary": VOCABULARY,
    }
    made = LPDTransformer(**{**config, "classes": CLASSES, **changes}).to(dtype).eval()
    generator = seed(0)
    for name, parameter in made.named_parameters():
        if "norm" not in name and "ln" not in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return made


def tokenizer(codes: int = VOCABULARY) -> VQTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VQTokenizer(
            width=8, multipliers=(1, 2, 2), blocks=1, latent_channels=16, codes=codes, code_dim=4, groups=4
        ).eval()


def orders(count: int, number: int = 1) -> torch.Tensor:
    return torch.rand(count, TOKENS, generator=seed(number)).argsort(dim=1)


def sample(count: int, number: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [count, N] in raster order, and labels."""
    generator = seed(number)
    tokens = torch.randint(VOCABULARY, (count, TOKENS), generator=generator)
    return tokens, torch.randint(CLASSES, (count,), generator=generator)


def teacher_forced(
    decoder: LPDTransformer,
    tokens_BN: torch.Tensor,
    labels_B: torch.Tensor,
    orders_BN: torch.Tensor,
    sizes: tuple[int, ...] = SIZES,
) -> torch.Tensor:
    """Logits at the places of the orders, in one pass."""
    ids = group_ids([sizes], decoder.tokens)
    attend = attending(dense_mask(ids, 1 + decoder.tokens))
    with torch.no_grad():
        return decoder(labels_B, tokens_BN.gather(1, orders_BN), orders_BN, orders_BN, attend)
