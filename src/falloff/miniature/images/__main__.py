"""Train the image miniature: `python -m falloff.miniature.images --help`."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from falloff.decoding.pipeline import LPDPipeline
from falloff.miniature.images import tokenizer, transformer

app = typer.Typer(help=__doc__, add_completion=False)
GENERATION = {"num_inference_steps": 20, "guidance_scale": 2.0, "order": "planned"}
TOKENIZER_SHARE = 0.12
"""Of the time, what the tokenizer is trained for."""


@app.command()
def train(
    work: Annotated[Path, typer.Argument(help="Where unfinished work is kept; give it again to go on.")],
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of training in all.")] = 1200,
) -> None:
    """Train tokenizer and transformer, and write the pipeline to WORK/checkpoint."""
    work.mkdir(parents=True, exist_ok=True)
    vae = tokenizer.train(work, TOKENIZER_SHARE * seconds)
    model = transformer.train_transformer(vae, work, (1 - TOKENIZER_SHARE) * seconds)
    save(LPDPipeline(model, vae), work / "checkpoint")


def save(pipe: LPDPipeline, folder: Path) -> None:
    """Write the pipeline in half precision, and its default call; beside first, then renamed."""
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.transformer.half()
    pipe.vae.half()
    pipe.save_pretrained(beside)
    (beside / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


if __name__ == "__main__":
    app()
