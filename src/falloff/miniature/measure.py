"""The miniature in numbers: sizes, the autoencoder's fidelity, where time goes, and prompt score."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from rich.progress import track

from falloff.miniature import autoencoder, digits
from falloff.miniature.checkpoint import call_arguments
from falloff.miniature.judge import judge, train_classifier

Classifier = torch.nn.Module


def machine() -> dict[str, Any]:
    """What the figures were measured on and with."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    names = [line.split(": ")[1] for line in lines if "model name" in line]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {p: version(p) for p in ("torch", "diffusers", "transformers", "scikit-learn", "numpy")},
    }


def sizes(pipe: WanPipeline, folder: Path) -> dict[str, Any]:
    """Parameters per part, and bytes of the folder."""
    parts = {"transformer": pipe.transformer, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    return {
        "parameters": {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        "bytes": sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
    }


def fidelity(vae: AutoencoderKLWan, classifier: Classifier, count: int, frames: int) -> dict[str, Any]:
    """PSNR on held-out clips of held-out handwriting, and how the judge reads clips and reconstructions."""
    held = autoencoder.held_out_clips(4 * count, frames)
    rebuilt = [(t, c, autoencoder.reconstruct(vae, c)) for t, c in track(held[:count], description="autoencoder")]
    psnrs = [autoencoder.psnr(c, r) for _, c, r in rebuilt]
    return {
        "psnr_db": {"mean": float(np.mean(psnrs)), "worst": min(psnrs), "clips": count, "frames": frames},
        "judge_on_clips": score([{"verdicts": verdicts(classifier, c, t)} for t, c in held]),
        "judge_on_reconstructions": score([{"verdicts": verdicts(classifier, r, t)} for t, _, r in rebuilt]),
    }


def verdicts(classifier: Classifier, clip: digits.Floats, prompt: str) -> list[dict[str, bool]]:
    """The judge's verdicts in a form for JSON."""
    return [vars(v) for v in judge(classifier, clip, prompt)]


def score(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares of videos with every asked digit found, and of digits whose colour and direction are right."""
    each = [v for r in records for v in r["verdicts"]]
    return {
        "videos": len(records),
        "digits": len(each),
        "every_digit_found": float(np.mean([all(v["found"] for v in r["verdicts"]) for r in records])),
        "digit_found": float(np.mean([v["found"] for v in each])),
        "colour_right": float(np.mean([v["colour"] for v in each])),
        "direction_right": float(np.mean([v["direction"] for v in each])),
    }


@contextmanager
def timed_attention(spent: list[float]) -> Iterator[None]:
    """Append the seconds of every self-attention (as many keys as queries) made inside."""
    inner = torch.nn.functional.scaled_dot_product_attention

    def timed(query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        began = time.perf_counter()
        out = inner(query, key, *args, **kwargs)
        if query.shape[-2] == key.shape[-2]:
            spent.append(time.perf_counter() - began)
        return out

    torch.nn.functional.scaled_dot_product_attention = timed
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = inner


@torch.no_grad()
def attention_share(pipe: WanPipeline, arguments: dict[str, Any], repeats: int = 5) -> dict[str, Any]:
    """Seconds of one dense forward at the default size, and self-attention's share of it (medians)."""
    latents = _latents_for(arguments)
    states = torch.zeros(1, arguments["max_sequence_length"], pipe.transformer.config.text_dim)
    walls, shares = [], []
    for _ in range(repeats + 1):
        spent: list[float] = []
        began = time.perf_counter()
        with timed_attention(spent):
            pipe.transformer(latents, torch.tensor([500.0]), states)
        walls.append(time.perf_counter() - began)
        shares.append(sum(spent) / walls[-1])
    return {
        "tokens": latents[0, 0].numel(),
        "forward_seconds": median(walls[1:]),
        "attention_share": median(shares[1:]),
    }


def _latents_for(arguments: dict[str, Any]) -> torch.Tensor:
    frames = 1 + (arguments["num_frames"] - 1) // 4
    return torch.zeros(1, autoencoder.CHANNELS, frames, arguments["height"] // 8, arguments["width"] // 8)


def generate(pipe: WanPipeline, arguments: dict[str, Any], prompt: str, seed: int) -> tuple[digits.Floats, float]:
    """A video [F, H, W, 3] in [0, 1] and the seconds it took."""
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    video = pipe(prompt=prompt, generator=generator, output_type="np", **arguments).frames[0]
    return np.asarray(video, dtype=np.float32), time.perf_counter() - began


def prompt_records(
    pipe: WanPipeline, classifier: Classifier, arguments: dict[str, Any], count: int, file: Path
) -> list[dict[str, Any]]:
    """One record per held-out prompt, kept line by line in `file`: an interrupted measurement goes on.

    Ctrl-C ends it early, with the records made so far.
    """
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    prompts = digits.held_out_prompts(count)
    try:
        for seed in track(range(len(records), count), description="prompts"):
            clip, seconds = generate(pipe, arguments, prompts[seed], seed)
            found = verdicts(classifier, clip, prompts[seed])
            records.append({"prompt": prompts[seed], "seed": seed, "seconds": seconds, "verdicts": found})
            with file.open("a") as lines:
                lines.write(json.dumps(records[-1]) + "\n")
    except KeyboardInterrupt:
        if not records:
            raise
    return records[:count]


def measure(
    folder: Path, work: Path, prompts: int, changes: dict[str, Any], say: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All figures of the checkpoint in `folder`, said as they come; `changes` amend the default call."""
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = call_arguments(folder) | changes
    classifier = train_classifier(work / "judge.safetensors")
    found: dict[str, Any] = {"machine": machine(), "call": arguments, **sizes(pipe, folder)}
    found |= fidelity(pipe.vae, classifier, count=16, frames=33)
    found |= attention_share(pipe, arguments)
    say(found)
    name = "-".join(["prompts", *(f"{k}={v}" for k, v in sorted(changes.items()))])
    records = prompt_records(pipe, classifier, arguments, prompts, work / f"{name}.jsonl")
    found["prompts_planned"] = prompts
    found["generation_seconds"] = median(r["seconds"] for r in records)
    found["prompt_score"] = score(records)
    found["prompts"] = records
    return found
