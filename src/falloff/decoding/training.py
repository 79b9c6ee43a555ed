"""Training a parallel decoder on cached image tokens: random orders, random groups, one pass a step.

As published (LPD, arXiv:2507.01957): AdamW, no average of weights, the class dropped for a tenth of the samples, the
loss the mean cross-entropy of all N queries. Unlike there, every sample of a batch has groups of its own.

Several processes share a step: each draws the whole batch from the step's number, and takes its own part of it. As many
as there are, they train the same model, but for the order of sums and for dropout.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from rich.progress import Progress
from torch import Tensor, nn

from falloff.decoding.layout import attending, dense_mask, flex_mask, group_ids
from falloff.decoding.sizes import group_sizes
from falloff.decoding.transformer import NO_CLASS, LPDTransformer
from falloff.training_state import load_state, save_state

if TYPE_CHECKING:
    from accelerate import Accelerator

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

    batch: samples a step, of all processes together. steps: group counts to train for, one drawn for each sample.
    warmup, decay: shares of the training in which the rate rises linearly, and falls along a cosine to ``floor`` of
    itself. clip: gradient norm.
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
    model: nn.Module, tokens_BN: Tensor, labels_B: Tensor, orders_BN: Tensor, sizes: Sequence[Sequence[int]]
) -> Tensor:
    """Mean cross-entropy of the queries, in nats. ``model``: an ``LPDTransformer``, or what stands for one in a process
    of several. ``sizes``: groups of each sample.
    """
    device, tokens = tokens_BN.device, tokens_BN.shape[1]
    ids = group_ids(sizes, tokens).to(device)
    mask = flex_mask if device.type == "cuda" else dense_mask
    placed = tokens_BN.gather(1, orders_BN)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(labels_B, placed, orders_BN, orders_BN, attending(mask(ids, 1 + tokens)))
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
    accelerator: Accelerator | None = None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> None:
    """Train to ``steps`` steps or ``seconds`` seconds in all, going on from ``folder``/decoder.pt where it is.

    With ``steps`` an interrupted training ends bit for bit as an uninterrupted one, by as many processes. The state is
    written every ``save_every`` seconds and at the end; ``on_step`` is told the number of steps done and the last loss.
    ``accelerator``: tells the device and the processes; the first of them writes and shows progress. Without one the
    model is trained where it is. Products are in bfloat16 on a GPU, as published, and as the weights elsewhere.

    Raises ``ValueError`` for both or neither of steps and seconds, a batch that processes cannot share evenly,
    processes that see different states, and accelerators that shard models or scale losses.
    """
    if (steps is None) == (seconds is None):
        raise ValueError(f"training takes either steps or seconds, got steps={steps} and seconds={seconds}")
    file, parts = folder / "decoder.pt", {"model": model, **optimizers}
    share = _share(model, recipe, accelerator)
    spent, step = load_state(file, parts)  # onto the device the model is on by now
    _check_same_step(step, share)
    began, saved = time.monotonic() - spent, time.monotonic()
    model.train()
    with Progress(disable=share.number != 0) as progress:
        bar = progress.add_task("transformer", total=1.0)
        while (done := step / steps if steps else spent / (seconds or 1)) < 1:
            loss = _step(share, codes, recipe, optimizers.values(), step, recipe.rate(done))
            # by clocks of their own, processes would have different rates and end at different steps
            step, spent = step + 1, _first(time.monotonic() - began, share)
            if share.number == 0 and time.monotonic() - saved >= save_every:
                save_state(file, parts, spent, step)
                saved = time.monotonic()
            progress.update(bar, completed=done, description=f"transformer, step {step}, loss {loss:.3f}")
            on_step(step, loss)
    if share.number == 0:
        save_state(file, parts, spent, step)
    model.eval()


class _Share(NamedTuple):
    """What one process of several does: its number, how many there are, and the model that averages gradients."""

    model: nn.Module
    device: torch.device
    number: int
    processes: int


def _share(model: LPDTransformer, recipe: Recipe, accelerator: Accelerator | None) -> _Share:
    if accelerator is None:
        return _Share(model, model.device, 0, 1)
    kind, precision = accelerator.distributed_type.value, accelerator.mixed_precision
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU") or precision not in ("no", "bf16"):
        raise ValueError(
            "training copies the model to every process and scales no loss, got an accelerator of type "
            f"{kind} with mixed precision {precision}; use MULTI_GPU, and no or bf16"
        )
    if recipe.batch % accelerator.num_processes:
        raise ValueError(
            f"a batch of {recipe.batch} has no even shares for {accelerator.num_processes} processes; "
            "choose a multiple of their number"
        )
    device, shared = accelerator.device, model.to(accelerator.device)
    if accelerator.num_processes > 1:
        shared = nn.parallel.DistributedDataParallel(shared, None if device.type == "cpu" else [device])
    return _Share(shared, device, accelerator.process_index, accelerator.num_processes)


def _first(value: float, share: _Share) -> float:
    """The first process's value."""
    if share.processes == 1:
        return value
    told = torch.tensor(value, dtype=torch.float64, device=share.device)
    torch.distributed.broadcast(told, 0)
    return float(told)


def _check_same_step(step: int, share: _Share) -> None:
    """All processes must see the same state, or they would wait for one another for ever."""
    if share.processes == 1:
        return
    both = torch.tensor([step, -step], device=share.device)
    torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
    last, first = int(both[0]), -int(both[1])
    if first != last:
        raise ValueError(f"processes would go on from steps {first} to {last}; give all of them one folder")


def _step(
    share: _Share,
    codes: Codes,
    recipe: Recipe,
    optimizers: Iterable[torch.optim.Optimizer],
    step: int,
    rate: float,
) -> float:
    """One step of all processes; returns this one's loss."""
    generator = torch.Generator().manual_seed(step)
    chosen = torch.randint(len(codes.labels_M), (recipe.batch,), generator=generator)
    tokens, labels = codes.tokens_MN[chosen].long(), codes.labels_M[chosen].long()
    labels[torch.rand(recipe.batch, generator=generator) < recipe.label_drop] = NO_CLASS
    orders = draw_orders(recipe.batch, tokens.shape[1], generator)
    drawn = torch.randint(len(recipe.steps), (recipe.batch,), generator=generator).tolist()
    sizes = [group_sizes(tokens.shape[1], recipe.steps[i]) for i in drawn]
    own = slice(share.number, None, share.processes)
    with torch.random.fork_rng():
        torch.manual_seed(step * share.processes + share.number)  # dropout knows the global generator alone
        tokens, labels, orders = (part[own].to(share.device) for part in (tokens, labels, orders))
        loss = decoding_loss(share.model, tokens, labels, orders, sizes[own])
        torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(share.model.parameters(), recipe.clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * optimizer.defaults["lr"]
        optimizer.step()
        optimizer.zero_grad()
    return float(loss.detach())
