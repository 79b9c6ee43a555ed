"""What each of two processes does that share tiny models out (FSDP), and what it notes of it."""

from __future__ import annotations

import copy
import gc
import json
import os
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from families import FAMILIES
from torch import nn

import falloff
from falloff import Schedule
from falloff.training import Course, Lora, Size, Sparse, TrainingError, sharding, studio, train_lora, train_sparse

WORLD = 2
SIZE = Size(frames=9, height=32, width=32)
LORA = Lora(size=SIZE, trained_frames=5, rank=4, validation=3, samples=1, rope="riflex")
TOKENS = replace(LORA, ulysses=WORLD, checkpointing=True)
COURSE = Course(steps=4, batch=2, rate=0.05, warmup=0, save_every=1, check_every=4, ema=0.9)
CALL = {"num_inference_steps": 3, "max_sequence_length": 8, "guidance_scale": 2.0}
SCHEDULE = Schedule(dense_first=1, dense_layers=())
SLA = falloff.SLA(density=0.4, q_block=4, kv_block=4)
SPARSE = Sparse(size=SIZE, rank=2, validation=1, samples=0, checkpointing=True)
NO_HOOKS = SimpleNamespace(hooks={})
KNOWN = ("Wan", "SkyReels-V2", "HunyuanVideo", "Mochi", "LTX", "CogVideoX", "CogVideoX 1.5 I2V", "Kandinsky 5")
TRAINED = [name for name in KNOWN if name in FAMILIES]
"""Families of models that trainings know."""


class Stopped(Exception):
    pass


def worded() -> Any:
    from worded import pipeline

    made = pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def half_precision() -> Any:
    """As diffusers loads Wan in bfloat16: with norms and tables in float32."""
    made = worded()
    for name, parameter in made.transformer.named_parameters():
        if not any(part in name for part in ("norm", "scale_shift_table", "time_embedder")):
            parameter.data = parameter.data.bfloat16()
    return made


def experts() -> Any:
    import worded_pipes

    return worded_pipes.experts()


def lora(pipe: Any, clips: Path, output: Path, lora: Lora = LORA, course: Course = COURSE, **more: Any) -> None:
    cache = output.parent / "cache"
    train_lora(
        pipe, clips, output, falloff.Radial(block=4), lora, course, schedule=SCHEDULE, call=CALL, cache=cache, **more
    )


def sparse(pipe: Any, clips: Path, output: Path, sparse: Sparse, **more: Any) -> None:
    course = replace(COURSE, steps=2, check_every=2, rate=0.02, ema=None)
    schedule = Schedule(dense_first=0, dense_layers=())
    cache = output.parent / "cache"
    train_sparse(pipe, clips, output, SLA, sparse, course, schedule=schedule, call=CALL, cache=cache, **more)


TRAININGS: dict[str, Callable[[Path, Path], None]] = {
    "lora": lambda clips, output: lora(worded(), clips, output),
    "half": lambda clips, output: lora(
        half_precision(), clips, output, replace(LORA, samples=0, checkpointing=True, precision="bf16")
    ),
    "experts": lambda clips, output: lora(
        experts(), clips, output, replace(LORA, rope="plain"), replace(COURSE, batch=4)
    ),
    "tokens": lambda clips, output: lora(worded(), clips, output, TOKENS),
    "velocity": lambda clips, output: sparse(worded(), clips, output, SPARSE),
    "output": lambda clips, output: sparse(
        worded(), clips, output, replace(SPARSE, aim="output", backbone="none", checkpointing=False)
    ),
}


def shares(clips: Path, output: Path) -> dict[str, Any]:
    """Train and stop, go on with all of the model, stop, and go on with a share: what a process holds of the model in
    the end, and whether anything holds all of it."""
    pipe = worded()
    weight = weakref.ref(pipe.transformer.blocks[0].ffn.net[2].weight)
    whole = sum(p.numel() for p in pipe.transformer.parameters())
    until(2, worded(), clips, output)
    os.environ[sharding.ASK] = "false"
    until(3, worded(), clips, output)
    os.environ[sharding.ASK] = "true"
    lora(pipe, clips, output)
    gc.collect()
    own = [p for name, p in pipe.transformer.named_parameters() if "lora" not in name]
    again = refused(lambda: lora(pipe, clips, output))
    return {"share": sum(p.to_local().numel() for p in own) / whole, "freed": weight() is None, "again": again}


def until(step: int, pipe: Any, clips: Path, output: Path) -> None:
    def stop(doing: str, done: int, total: int) -> None:
        if doing.startswith("training") and done == step:
            raise Stopped

    with suppress(Stopped):
        lora(pipe, clips, output, progress=stop)


def tokens(clips: Path, output: Path) -> dict[str, Any]:
    """How many tokens of a sample a process runs the layers on, and what is left of that."""
    pipe, seen = worded(), set()
    seeing = pipe.transformer.blocks[1].register_forward_pre_hook(lambda _, given: seen.add(given[0].shape[1]))
    lora(pipe, clips, output, replace(TOKENS, samples=0), replace(COURSE, steps=1))
    seeing.remove()
    processors = {attn.processor._parallel_config for block in pipe.transformer.blocks for attn in (block.attn1,)}
    hooks = [name for m in pipe.transformer.modules() for name in getattr(m, "_diffusers_hook", NO_HOOKS).hooks]
    return {"seen": sorted(seen), "left": [str(left) for left in (*processors, *hooks) if left is not None]}


def gradients(name: str) -> float:
    """How far the gradient for a shared model's input is from that of a whole one, in terms of the latter's size."""
    family = FAMILIES[name]
    whole, given = family.build().requires_grad_(False), family.arguments((3, 4, 5))
    both = []
    for model in (whole, copy.deepcopy(whole)):
        if both:
            sharding.shard([model], Accelerator())
        model.enable_gradient_checkpointing()
        latents = given["hidden_states"].clone().requires_grad_()
        with sharding.quiet():
            model(**{**given, "hidden_states": latents})[0].square().mean().backward()
        both.append(latents.grad)
    return float((both[1] - both[0]).abs().max() / both[0].abs().max())


def refusals(clips: Path, output: Path) -> dict[str, str]:
    told = {}
    settings = {"FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true", "FSDP_ACTIVATION_CHECKPOINTING": "true"}
    for name, value in settings.items():
        before = os.environ.get(name)
        os.environ[name] = value
        told[name] = refused(lambda: lora(worded(), clips, output))
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before
    told["full"] = refused(lambda: sparse(worded(), clips, output, replace(SPARSE, backbone="full")))
    odd = replace(TOKENS, size=replace(SIZE, height=16, width=16))
    told["odd"] = refused(lambda: lora(worded(), clips, output, odd))
    heads = worded()
    heads.transformer.register_to_config(num_attention_heads=3)
    told["heads"] = refused(lambda: lora(heads, clips, output, TOKENS))
    pipe = worded()
    if dist.get_rank():
        pipe.text_encoder.to("meta")  # as transformers leaves it in all processes but the first
        nn.init.zeros_(pipe.transformer.scale_shift_table)
    told["unlike"] = refused(lambda: lora(pipe, clips, output))
    pipe = worded()
    pipe.transformer.proj_out.weight = nn.Parameter(pipe.transformer.proj_out.weight.to(torch.int8), False)
    told["quantized"] = refused(lambda: lora(pipe, clips, output))
    return told


def refused(training: Callable[[], None]) -> str:
    try:
        training()
    except TrainingError as error:
        return str(error)
    return "nothing"


def work(rank: int, port: int, clips: str, folder: str) -> None:
    """Every training once by processes that have all of the model each, and once by such that share it out."""
    warnings.simplefilter("ignore")  # torch warns of the very start of process groups
    torch.set_num_threads(1)
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    given |= {"ACCELERATE_USE_CPU": "true", "FSDP_VERSION": 2}
    os.environ.update({name: str(value) for name, value in given.items()})
    studio.PATIENCE /= 24 * 30  # a process that waits in vain is to tell so
    studio.Accelerator.end_training = lambda self: None  # parts the processes, which have more to do together
    noted: dict[str, Any] = {}
    for kind, flag in (("whole", "false"), ("shared", "true")):
        os.environ[sharding.ASK] = flag
        for name, training in TRAININGS.items():
            os.environ["FSDP_RESHARD_AFTER_FORWARD"] = str(name != "velocity")
            training(Path(clips), Path(folder, kind, name))
    noted["shares"] = shares(Path(clips), Path(folder, "shared", "cut"))
    noted["tokens"] = tokens(Path(clips), Path(folder, "tokens"))
    noted["gradients"] = {name: gradients(name) for name in TRAINED}
    noted["refusals"] = refusals(Path(clips), Path(folder, "refused"))
    Path(folder, f"{rank}.json").write_text(json.dumps(noted))
    dist.destroy_process_group()
