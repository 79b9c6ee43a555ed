"""Train and measure the miniature: `python -m falloff.miniature --help`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKLWan
from rich import print_json

from falloff.miniature import autoencoder, checkpoint, path, transformer
from falloff.miniature.clips import write_clips
from falloff.miniature.measure import measure as measure_all

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)
Work = Annotated[Path, typer.Argument(help="Where unfinished work is kept; give it again to go on.")]
Seconds = Annotated[float, typer.Option(min=1, help="Seconds of training in all.")]


@app.command()
def train_autoencoder(work: Work, seconds: Seconds = 900) -> None:
    """Train the autoencoder, measure its latents' statistics and write it to WORK/vae."""
    work.mkdir(parents=True, exist_ok=True)
    vae = autoencoder.train(work, seconds)
    autoencoder.set_statistics(vae)
    vae.save_pretrained(work / "vae")


@app.command()
def train(
    work: Work,
    seconds: Seconds = 3600,
    start: Annotated[
        Path | None, typer.Option(help="A checkpoint folder whose autoencoder and weights to go on from.")
    ] = None,
) -> None:
    """Train transformer and text encoder on WORK/vae's latents and write the pipeline to WORK/checkpoint."""
    work.mkdir(parents=True, exist_ok=True)
    vae = AutoencoderKLWan.from_pretrained((start or work) / "vae", dtype=torch.float32)
    model = transformer.train(vae, work, seconds, checkpoint.load_model(start) if start else None)
    checkpoint.save(vae, model, work / "checkpoint")


@app.command()
def measure(
    work: Work,
    checkpoint_folder: Annotated[Path | None, typer.Option("--checkpoint", help="Default: the shipped one.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts to generate.")] = 64,
    frames: Annotated[int | None, typer.Option(help="Frames per video instead of the default.")] = None,
) -> None:
    """Print all figures of a checkpoint and write them to WORK/measured.json."""
    work.mkdir(parents=True, exist_ok=True)
    changes = {"num_frames": frames} if frames else {}
    found = {"command": f"python -m falloff.miniature measure WORK --prompts {prompts}"}
    found |= measure_all(checkpoint_folder or path(), work, prompts, changes, lambda f: print_json(data=f))
    beside = work / "measured.part"
    beside.write_text(json.dumps(found, indent=1) + "\n")
    os.replace(beside, work / "measured.json")
    print_json(data={k: v for k, v in found.items() if k != "prompts"})


@app.command()
def clips(
    folder: Annotated[Path, typer.Argument(help="Where the videos go.")],
    count: Annotated[int, typer.Option(min=1, help="How many.")] = 64,
    frames: Annotated[int, typer.Option(min=1, help="Of each.")] = 257,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same clips.")] = 0,
) -> None:
    """Write videos of the miniature's world with their captions, to tune it on."""
    write_clips(folder, count, frames, seed)
    print(f"wrote {count} videos of {frames} frames with captions to {folder}")


if __name__ == "__main__":
    app()
