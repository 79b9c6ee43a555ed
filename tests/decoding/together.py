"""What each of two processes does that train one model together."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import torch
from decoders import TOKENS, model, sample

from falloff.decoding.training import Codes, Recipe, adamw, train
from falloff.decoding.transformer import LPDTransformer

WORLD = 2
RECIPE = Recipe(batch=6, steps=(4, 8, TOKENS), warmup=0.0)


def trained(folder: Path, steps: int, accelerator: object = None, dropout: float = 0.0) -> LPDTransformer:
    folder.mkdir(parents=True, exist_ok=True)
    made = model(dropout=dropout)
    both = adamw(made, 1e-3)
    train(made, Codes(*sample(12)), folder, RECIPE, both, steps=steps, save_every=0, accelerator=accelerator)  # type: ignore[arg-type]  # an Accelerator, imported by those who have one
    return made


def work(rank: int, port: int, folder: str) -> None:
    """Train in one go, and with an interruption; write what came out, and who wrote states."""
    warnings.simplefilter("ignore")  # torch warns of the very start of process groups
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in given.items()})
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    own = Path(folder, str(rank))
    wholes = {"plain": trained(own / "plain", 3, accelerator), "dropout": trained(own / "whole", 4, accelerator, 0.1)}
    shared = Path(folder, "shared")
    trained(shared, 2, accelerator, 0.1)
    accelerator.wait_for_everyone()
    wholes["resumed"] = trained(shared, 4, accelerator, 0.1)
    torch.save({name: made.state_dict() for name, made in wholes.items()}, Path(folder, f"{rank}.pt"))
    apart = Path(folder, "apart", str(rank))
    if rank == 0:
        trained(apart, 1)
    apart.mkdir(parents=True, exist_ok=True)
    errors = []
    for refused in (lambda: trained(apart, 2, accelerator), lambda: odd(apart, accelerator)):
        try:
            refused()
        except ValueError as error:
            errors.append(str(error))
    wrote = sorted(str(file.relative_to(own)) for file in own.rglob("decoder.pt"))
    Path(folder, f"{rank}.json").write_text(json.dumps({"wrote": wrote, "errors": errors}))
    torch.distributed.destroy_process_group()


def odd(folder: Path, accelerator: object) -> None:
    """A batch of five for two processes."""
    made = model()
    recipe = Recipe(batch=5, steps=(4,))
    train(made, Codes(*sample(12)), folder, recipe, adamw(made, 1e-3), steps=1, accelerator=accelerator)  # type: ignore[arg-type]  # as above
