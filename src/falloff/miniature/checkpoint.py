"""Put the trained parts together as a pipeline folder that `WanPipeline.from_pretrained` loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline

from falloff.miniature import text
from falloff.miniature.transformer import SHIFT, Model

GENERATION: dict[str, Any] = {
    "height": 128,
    "width": 128,
    "num_frames": 65,
    "num_inference_steps": 12,
    "guidance_scale": 3.0,
    "max_sequence_length": text.LENGTH,
    "fps": 16,
}


def save(vae: AutoencoderKLWan, model: Model, folder: Path) -> None:
    """Write the pipeline and its default call arguments to `folder`; beside first, then renamed."""
    pipe = WanPipeline(
        tokenizer=text.tokenizer(),
        text_encoder=model.text_encoder.eval(),
        vae=vae.eval().half(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT),
        transformer=model.transformer.eval().half(),
    )
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    pipe.save_pretrained(beside)
    _forget_origin(beside / "vae" / "config.json")
    (beside / "generation.json").write_text(json.dumps(GENERATION, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(beside, folder)


def load_model(folder: Path) -> Model:
    """The trained parts of a pipeline folder in single precision, to be trained on."""
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    model = Model()
    model.transformer.load_state_dict(pipe.transformer.state_dict())
    model.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    return model.train()


def _forget_origin(config: Path) -> None:
    """Drop the folder that a part was loaded from, which diffusers writes down."""
    entries = json.loads(config.read_text())
    entries.pop("_name_or_path", None)
    config.write_text(json.dumps(entries, indent=2) + "\n")


def call_arguments(folder: Path) -> dict[str, Any]:
    """The default arguments for calling the pipeline (without `fps`, which is for writing the video)."""
    arguments: dict[str, Any] = json.loads((folder / "generation.json").read_text())
    del arguments["fps"]
    return arguments
