"""What each of two processes does that share the tokens of tiny models (Ulysses), and finds by itself alone."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import tiny
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, ParallelConfig
from diffusers.hooks.context_parallel import apply_context_parallel
from families import FAMILIES, TEXT, Family, run
from torch import Tensor, nn

import falloff
from falloff import BlockMap, Plan
from falloff.methods import Call, Method, State

WORLD = 2
GRIDS = {"video": (3, 4, 5), "image": (1, 4, 5)}


@dataclass(frozen=True, kw_only=True)
class PerHead(Method):
    """Head number h leaves out all keys but the first 2 h + 2 of each query's, and those of text before them."""

    name: ClassVar[str] = "per-head"
    schedule: ClassVar[falloff.Schedule] = tiny.ALWAYS

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan:
        n, heads = call.sequence.tokens, range(call.first_head, call.first_head + q_BHND.shape[1])
        seen = [2 * head + 2 + (call.sequence.text if call.sequence.text_side == "before" else 0) for head in heads]
        keys = torch.arange(n) < torch.tensor(seen)[:, None]
        blocks = BlockMap.from_dense(keys[None, :, None].expand(1, -1, n, -1).contiguous())
        return Plan(q_len=n, kv_len=n, q_sizes=1, kv_sizes=1, blocks=blocks)


def arguments(family: Family) -> dict[str, Any]:
    """As of the family, with six tokens of text, which two processes can share."""
    given = family.arguments(GRIDS["image" if family.image else "video"], 2)
    random = torch.Generator().manual_seed(1)
    given["encoder_hidden_states"] = torch.randn(2, 6, TEXT, generator=random)
    if "txt_ids" in given:
        ids = given["txt_ids"]
        given["txt_ids"] = ids.new_zeros(*ids.shape[:-2], 6, ids.shape[-1])
    if "encoder_hidden_states_mask" in given:
        given["encoder_hidden_states_mask"] = torch.arange(6) < torch.tensor([[4], [6]])
    if "encoder_attention_mask" in given:
        given["encoder_attention_mask"] = None  # diffusers fails on LTX's when it is shared
    return given


def share(model: nn.Module) -> nn.Module:
    """What ``enable_parallelism`` does, which needs an accelerator."""
    config = ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=WORLD))
    inner = config.context_parallel_config
    cpu = torch.device("cpu")
    mesh = dist.device_mesh.init_device_mesh("cpu", inner.mesh_shape, mesh_dim_names=inner.mesh_dim_names)
    config.setup(dist.get_rank(), WORLD, cpu, mesh=mesh)
    model._parallel_config = config
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, inner, model._cp_plan)
    return model


def same(name: str, method: Any, *, first: bool) -> None:
    """Shared before or after ``enable``, a model gives what it gives alone, and without us what it gave before."""
    family = FAMILIES[name]
    alone, given = family.build(), arguments(family)
    dense = run(alone, given)
    expected = run(falloff.enable(alone, method), given)
    model = share(family.build()) if first else falloff.enable(family.build(), method)
    model = falloff.enable(model, method) if first else share(model)
    torch.testing.assert_close(run(model, given), expected, atol=1e-6, rtol=1e-5)
    ours, theirs = falloff.report(model), falloff.report(alone)
    assert ours.reasons == theirs.reasons
    assert [call.layer for call in ours.calls] == list(range(family.layers))
    assert (expected - dense).abs().max() > 1e-3 or theirs.density == 1
    falloff.disable(model)
    torch.testing.assert_close(run(model, given), dense, atol=1e-6, rtol=1e-5)


def compiled() -> None:
    family = FAMILIES["FLUX.1"]
    given, method = arguments(family), tiny.Frames(rows=True)
    expected = run(falloff.enable(family.build(), method), given)
    model = falloff.enable(share(family.build()), method)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(run(model, given), expected, atol=1e-6, rtol=1e-5)


def learned() -> None:
    """Of parameters of single heads, a process takes those of its own."""
    family = FAMILIES["Wan"]
    given, method = arguments(family), falloff.SLA2(density=0.3, q_block=8, kv_block=8)
    outputs = []
    for model in (family.build(), share(family.build())):
        falloff.enable(model, method)
        with torch.no_grad():
            for layer in falloff.branches(model)["0"].values():
                layer.offset.copy_(torch.tensor([3.0, -3.0]))
        outputs.append(run(model, given))
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)


def gradients() -> None:
    family = FAMILIES["FLUX.1"]
    given, method = arguments(family), tiny.Frames(rows=True)
    found = []
    for model in (family.build(), share(family.build())):
        falloff.enable(model, method)(**given)[0].square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    alone, shared = found
    for name in ("single_transformer_blocks.0.attn.to_q.weight", "transformer_blocks.0.attn.to_v.weight"):
        whole = shared[name].clone()
        dist.all_reduce(whole)  # every process has the gradient of its own tokens
        torch.testing.assert_close(whole, alone[name], atol=1e-6, rtol=1e-3)


CASES: dict[str, Callable[[], None]] = {
    "Wan, dense": lambda: same("Wan", "dense", first=True),
    "Wan": lambda: same("Wan", tiny.Frames(), first=True),
    "Wan, shared later": lambda: same("Wan", tiny.Frames(), first=False),
    "LTX": lambda: same("LTX", tiny.Frames(), first=True),
    "FLUX.1": lambda: same("FLUX.1", tiny.Frames(rows=True), first=True),
    "FLUX.1, shared later": lambda: same("FLUX.1", tiny.Frames(rows=True), first=False),
    "FLUX.2": lambda: same("FLUX.2", tiny.Frames(rows=True), first=True),
    "QwenImage": lambda: same("QwenImage", tiny.Frames(rows=True), first=True),
    "plans of each head": lambda: same("FLUX.1", PerHead(), first=True),
    "learned": learned,
    "compiled": compiled,
    "gradients": gradients,
}


def work(rank: int, folder: str) -> None:
    """Runs every case in process ``rank`` and writes what failed, by case."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    faults = {}
    for name, case in CASES.items():
        try:
            case()
        except Exception as error:  # each case is a test of its own, which tells the fault
            faults[name] = f"process {rank}: {type(error).__name__}: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps(faults))
    dist.destroy_process_group()
