"""The miniature's transformer, trained by flow matching on captions that its text encoder has learnt before.

x_t = (1 - s) x_0 + s noise; the transformer learns noise - x_0 from x_t, the timestep 1000 s and the caption.
Training goes from small and short (shapes and colours, many samples per second) to large and long. Positions
are rotary, hence relative, so what is learnt on a small canvas carries over.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from rich.progress import Progress
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from falloff.miniature import text
from falloff.miniature.autoencoder import CHANNELS
from falloff.miniature.muon import optimizers, set_rate
from falloff.miniature.pool import Pool, Recipe, load
from falloff.training_state import load_state, save_state, seeded

SMALL = Recipe("small", size=64, frames=9, clips=4000, pairs=0.0, composed=0.0)
# Two digits are what is hard: which colour, digit and direction belong together is learnt from pairs alone.
FULL = Recipe("full", size=128, frames=17, clips=1600, pairs=0.0, composed=0.8)
LONG = Recipe("long", size=128, frames=65, clips=480, pairs=0.0, composed=0.8)


@dataclass(frozen=True)
class Meal:
    """One kind of training step: `batch` clips of a recipe, cut to `frames` latent frames."""

    recipe: Recipe
    frames: int
    batch: int


@dataclass(frozen=True)
class Stage:
    """Its meals in turn, until the share `until` of the training time is spent."""

    until: float
    meals: tuple[Meal, ...]


# A clip on the small canvas costs a quarter of one on the full canvas, and shapes are learnt as well on it.
SHAPES = Meal(SMALL, 3, 16)
STAGES = (
    Stage(0.30, (SHAPES, SHAPES, SHAPES, Meal(FULL, 3, 6))),
    Stage(0.48, (SHAPES, Meal(FULL, 3, 6), Meal(FULL, 5, 4))),
    Stage(0.68, (Meal(FULL, 3, 6), Meal(FULL, 5, 4))),
    Stage(0.80, (Meal(FULL, 5, 4), Meal(LONG, 9, 2))),
    Stage(1.0, (Meal(LONG, 9, 2), Meal(LONG, 17, 1), Meal(LONG, 17, 1))),
)
SHAPES_KNOWN = 0.48  # where training goes on from weights that draw digits already
NO_CAPTION = 0.1  # the share of clips trained without their caption, for guidance
SHIFT = 5.0


def build_transformer() -> WanTransformer3DModel:
    """The untrained transformer (about 1.7 M parameters)."""
    return WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=text.WIDTH,
        freq_dim=64,
        ffn_dim=512,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


class Model(torch.nn.Module):
    """Transformer and text encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = build_transformer()
        self.text_encoder = text.build_encoder()


def train(vae: AutoencoderKLWan, folder: Path, seconds: float, start: Model | None = None) -> Model:
    """Train for `seconds` in all, resuming from `folder`/transformer.pt; returns the averaged weights.

    Without that file training begins with the weights of `start`, or afresh; in both cases the text encoder learns
    from captions first and is left alone from then on.
    """
    model = start or seeded(Model)
    opening = SHAPES_KNOWN if start else 0.0
    if not (folder / "transformer.pt").exists():
        text.teach(model.text_encoder)
    model.text_encoder.requires_grad_(False)
    model.transformer.compile(dynamic=False)  # a fifth to two fifths faster, once each kind of step is compiled
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # type: ignore[no-untyped-call]  # torch's
    matrices = (p for p in model.transformer.blocks.parameters() if p.ndim == 2)
    both = optimizers(matrices, model, rates=(0.02, 2e-3))
    parts = {"model": model, "averaged": averaged, **both}
    spent, step = load_state(folder / "transformer.pt", parts)
    pools: dict[str, Pool] = {}
    losses: dict[Meal, list[float]] = defaultdict(list)
    began, saved = time.monotonic() - spent, time.monotonic()
    with Progress() as progress:
        bar = progress.add_task("transformer", total=seconds, completed=int(spent))
        while (spent := time.monotonic() - began) < seconds:
            meal = meal_at(opening + (1 - opening) * spent / seconds, step)
            if meal.recipe.name not in pools:
                pools[meal.recipe.name] = load(meal.recipe, vae, folder)
            set_rate(both.values(), _rate(step, spent / seconds))
            losses[meal].append(_step(model, both.values(), pools[meal.recipe.name], meal, step))
            averaged.update_parameters(model)
            step += 1
            if step % 50 == 0:
                progress.console.print(_report(step, spent, losses), highlight=False)
                losses.clear()
            if time.monotonic() - saved > 60:
                save_state(folder / "transformer.pt", parts, spent, step)
                saved = time.monotonic()
            progress.update(bar, completed=spent)
    save_state(folder / "transformer.pt", parts, seconds, step)
    model.load_state_dict(averaged.module.state_dict())
    return model.eval()


def meal_at(done: float, step: int) -> Meal:
    """What to train on at the share `done` of the time."""
    stage = next((s for s in STAGES if done < s.until), STAGES[-1])
    return stage.meals[step % len(stage.meals)]


def _rate(step: int, done: float) -> float:
    """Warm up over 50 steps, stay for 60 % of the time, and fall linearly to 3 %."""
    return min(1.0, (step + 1) / 50) * min(1.0, max(0.03, 2.5 * (1 - done)))


def _step(model: Model, optimizers: Iterable[torch.optim.Optimizer], pool: Pool, meal: Meal, step: int) -> float:
    rng = np.random.default_rng([6, step])
    clean, captions = pool.draw(rng, meal.batch, meal.frames)
    captions = ["" if rng.random() < NO_CAPTION else c for c in captions]
    generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
    loss = flow_loss(model, clean, captions, generator)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())


def flow_loss(model: Model, clean: torch.Tensor, captions: list[str], generator: torch.Generator) -> torch.Tensor:
    """Mean squared error of the predicted velocity for `clean`, [batch, channels, frames, height, width]."""
    noise = torch.randn(clean.shape, generator=generator)
    s = draw_times(len(captions), generator)
    weight = s.view(-1, 1, 1, 1, 1)
    states = text.embed(model.text_encoder, captions)
    noisy = (1 - weight) * clean + weight * noise
    predicted = model.transformer(noisy, 1000 * s, states, return_dict=False)[0]
    return torch.nn.functional.mse_loss(predicted, noise - clean)


def draw_times(count: int, generator: torch.Generator) -> torch.Tensor:
    """Noise levels in (0, 1): stratified logit-normal, shifted to more noise, a tenth uniform."""
    even = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    even = even[torch.randperm(count, generator=generator)].clamp(1e-4, 1 - 1e-4)
    s = torch.sigmoid(torch.special.ndtri(even))
    s = SHIFT * s / (1 + (SHIFT - 1) * s)
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.1, uniform, s)


def _report(step: int, spent: float, losses: dict[Meal, list[float]]) -> str:
    means = ", ".join(f"{m.recipe.name} {m.frames}: {np.mean(v):.4f}" for m, v in losses.items())
    return f"step {step} {spent:.0f} s loss {means}"
