"""Training a parallel decoder on cached image tokens: random orders, random groups, one pass a step.

As published (LPD, arXiv:2507.01957): AdamW, no average of weights, the class dropped for a tenth of the samples, the
loss the mean cross-entropy of all N queries. Unlike there, every sample of a batch has groups of its own.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from falloff.decoding.layout import attending, dense_mask, flex_mask, group_ids
from falloff.decoding.sizes import group_sizes
from falloff.decoding.transformer import NO_CLASS, LPDTransformer

Optimizers = Mapping[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class Codes:
    """Tokens of the training images in raster order, an integer tensor [images, N], and their classes, [images]."""

    tokens_MN: Tensor
    labels_M: Tensor

    def __post_init__(self) -> None:
        if self.tokens_MN.ndim != 2 or self.labels_M.shape != self.tokens_MN.shape[:1]:
            raise ValueError(
                "codes are tokens [images, N] and labels [images], "
                f"got {list(self.tokens_MN.shape)} and {list(self.labels_M.shape)}"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train. Learning rates stand in the optimizers; here is how they go over the share of training done.

    batch: samples a step. steps: group counts to train for, one drawn for each sample. warmup, decay: shares of the
    training in which the rate rises linearly, and falls along a cosine to ``floor`` of itself. clip: gradient norm.
    """

    batch: int
    steps: tuple[int, ...] = (8, 12, 16, 20, 24, 32, 64, 128, 256)
    label_drop: float = 0.1
    warmup: float = 1 / 9
    decay: float = 1 / 9
    floor: float = 0.0125
    clip: float = 3.0

    def rate(self, done: float) -> float:
        """Factor on the learning rates at the share ``done`` of the training."""
        rise = min(1.0, done / self.warmup) if self.warmup else 1.0
        fall = max(0.0, (done - 1 + self.decay) / self.decay) if self.decay else 0.0
        return rise * (self.floor + (1 - self.floor) * (0.5 + 0.5 * math.cos(math.pi * fall)))


def adamw(model: LPDTransformer, rate: float) -> dict[str, torch.optim.Optimizer]:
    """The published optimizer: weight decay on everything but vectors. ``rate``: 1e-4 for each 256 samples a step."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return {"adamw": torch.optim.AdamW(groups, rate, betas=(0.9, 0.95))}


def draw_orders(count: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Uniformly random orders, int64 [count, tokens]."""
    return torch.rand(count, tokens, generator=generator).argsort(dim=1)


def decoding_loss(
    model: LPDTransformer, tokens_BN: Tensor, labels_B: Tensor, orders_BN: Tensor, sizes: Sequence[Sequence[int]]
) -> Tensor:
    """Mean cross-entropy of the queries, in nats. ``sizes``: groups of each sample."""
    device = tokens_BN.device
    ids = group_ids(sizes, model.tokens).to(device)
    mask = flex_mask if device.type == "cuda" else dense_mask
    placed = tokens_BN.gather(1, orders_BN)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(labels_B, placed, orders_BN, orders_BN, attending(mask(ids, 1 + model.tokens)))
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), placed.flatten())


def train(
    model: LPDTransformer,
    codes: Codes,
    folder: Path,
    recipe: Recipe,
    optimizers: Optimizers,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    save_every: float = 60,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train to ``steps`` steps or ``seconds`` seconds in all, going on from ``folder``/decoder.pt where it is.

    With ``steps`` an interrupted training ends bit for bit as an uninterrupted one. The state is written every
    ``save_every`` seconds and at the end; ``on_step`` is told the number of steps done and the last loss.
    """
    if (steps is None) == (seconds is None):
        raise ValueError(f"training takes either steps or seconds, got steps={steps} and seconds={seconds}")
    file, parts = folder / "decoder.pt", {"model": model, **optimizers}
    spent, step = _load(file, parts)
    began, saved = time.monotonic() - spent, time.monotonic()
    model.train()
    with Progress() as progress:
        bar = progress.add_task("transformer", total=1.0)
        while (done := step / steps if steps else spent / (seconds or 1)) < 1:
            loss = _step(model, codes, recipe, optimizers.values(), step, recipe.rate(done))
            step, spent = step + 1, time.monotonic() - began
            if time.monotonic() - saved >= save_every:
                _save(file, parts, spent, step)
                saved = time.monotonic()
            progress.update(bar, completed=done, description=f"transformer, step {step}, loss {loss:.3f}")
            on_step(step, loss)
    _save(file, parts, spent, step)
    model.eval()


def _step(
    model: LPDTransformer,
    codes: Codes,
    recipe: Recipe,
    optimizers: Iterable[torch.optim.Optimizer],
    step: int,
    rate: float,
) -> float:
    generator = torch.Generator().manual_seed(step)
    device = model.device
    chosen = torch.randint(len(codes.labels_M), (recipe.batch,), generator=generator)
    tokens, labels = codes.tokens_MN[chosen].long(), codes.labels_M[chosen].long()
    labels[torch.rand(recipe.batch, generator=generator) < recipe.label_drop] = NO_CLASS
    orders = draw_orders(recipe.batch, model.tokens, generator)
    drawn = torch.randint(len(recipe.steps), (recipe.batch,), generator=generator).tolist()
    sizes = [group_sizes(model.tokens, recipe.steps[i]) for i in drawn]
    with torch.random.fork_rng():
        torch.manual_seed(step)  # dropout knows the global generator alone
        loss = decoding_loss(model, tokens.to(device), labels.to(device), orders.to(device), sizes)
        torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def _save(file: Path, parts: Mapping[str, Any], spent: float, step: int) -> None:
    """Beside first, then renamed."""
    beside = file.with_suffix(".part")
    torch.save({"parts": {name: p.state_dict() for name, p in parts.items()}, "spent": spent, "step": step}, beside)
    os.replace(beside, file)


def _load(file: Path, parts: Mapping[str, Any]) -> tuple[float, int]:
    """Fill the parts; returns the seconds and the steps spent."""
    if not file.exists():
        return 0.0, 0
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(state["parts"][name])
    return state["spent"], state["step"]
