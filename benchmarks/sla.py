"""One call of SLA, forward and backward, against dense attention, and what its parts take.

    python benchmarks/sla.py --dtype float32 --dtype bfloat16 --output benchmarks/results/sla-cpu.json

Its blocks are chosen once, as for queries and keys of noise, since their cost depends on their number alone; what
choosing takes is told apart. Speed-up is over the fastest dense attention there is, our own kernels with every block on
included. The same command runs on a GPU where there is one, with --shape wan1.3b-480p.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any, get_args

import torch
from torch import Tensor

import falloff
from falloff import kernels
from falloff.evaluation.bench import record
from falloff.evaluation.bench.arms import Inputs, arm, dense_arms
from falloff.evaluation.bench.dense import Attend
from falloff.evaluation.bench.shapes import Shape, shape_of
from falloff.evaluation.bench.timing import Times, interleaved, tried
from falloff.kernels.linear import Over, linear_attention, refuse_triton
from falloff.methods.base import Call, State
from falloff.methods.branch import Layer, Work
from falloff.plan import Plan


def planned(method: falloff.SLA, shape: Shape, inputs: Inputs) -> tuple[Plan, float]:
    """The plan, and the least milliseconds that making it took."""
    q, k, v = (x.detach() for x in inputs[:3])
    assert shape.sequence is not None
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        plan = method.plan(Call(sequence=shape.sequence), q, k, v, State())
        if q.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    assert isinstance(plan, Plan)
    return plan, 1e3 * min(seconds)


def parts(method: falloff.SLA, plan: Plan, shape: Shape, device: torch.device) -> dict[str, Attend]:
    """The whole of it, with a projection that has learned something, and its linear part by itself."""
    layer = Layer(heads=shape.heads, head_dim=shape.head_dim, width=shape.heads * shape.head_dim)
    branch = method.branch(layer).to(device)
    torch.nn.init.eye_(branch.proj.weight)

    def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = kernels.attend(plan, q, k, v)
        work = Work(plan=plan, q_BHND=q, k_BHND=k, v_BHND=v, out_BHND=out, scale=shape.head_dim**-0.5)
        made: Tensor = branch(work)
        return made

    def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(plan, q, k, v, features=method.features, over=method.linear_over)[0]

    return {f"SLA, {method.linear_over}": whole, f"linear alone, {method.linear_over}": linear}


def measure(density: float, shape: Shape, dtype: torch.dtype, device: torch.device, rounds: int) -> dict[str, Any]:
    inputs = Inputs.random(shape.heads, shape.tokens, shape.head_dim, dtype=dtype, device=device, backward=True)
    names = [name for name, there, _ in kernels.available() if there and name != "reference"]
    dense, refused = dense_arms(inputs, names)
    ways: dict[str, Attend] = {}
    for over in get_args(Over):
        method = falloff.SLA(density=density, linear_over=over)
        plan, plan_ms = planned(method, shape, inputs)
        ways |= parts(method, plan, shape, device)
    ways["blocks alone"] = lambda q, k, v: kernels.attend(plan, q, k, v)  # the same blocks, whichever the plan
    able, failed = tried(dense | {name: arm(attend, inputs) for name, attend in ways.items()}, device)
    times = interleaved(able, rounds=rounds, device=device, threads=torch.get_num_threads())
    without = refuse_triton(plan, *inputs[:3], method.features, method.linear_over)
    peers = {name: taken for name, taken in times.items() if name in dense}
    return {
        "shape": shape.name,
        "heads": shape.heads,
        "head_dim": shape.head_dim,
        "tokens": shape.tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "density": plan.density,
        "plan_ms": plan_ms,
        "kernel": kernels.choose(plan, inputs.q, needs_grad=True, needs_lse=False).name,
        "linear": "triton" if without is None else f"PyTorch's operators, not triton: {without}",
        "arms": {name: {"kind": "dense" if name in dense else "sparse"} | told(times[name], peers) for name in times},
        "refused": refused | failed,
    }


def told(taken: Times, peers: dict[str, Times]) -> dict[str, float]:
    """Medians in ms, and speed-up over the fastest dense forward and the fastest dense backward."""
    forward, backward = median(taken.forward), median(taken.backward)
    return {
        "forward_ms": 1e3 * forward,
        "backward_ms": 1e3 * backward,
        "forward_speedup": min(median(peer.forward) for peer in peers.values()) / forward,
        "backward_speedup": min(median(peer.backward) for peer in peers.values()) / backward,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="4,64,32x16x16")
    parser.add_argument("--density", type=float, default=0.05)
    types = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=types, action="append", help="repeatable; float32 unless given")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        shape = shape_of(given.shape)
    except ValueError as error:
        parser.error(str(error))
    if shape.sequence is None:
        parser.error(f"--shape {given.shape} has no grid, and SLA needs one")
    rows = []
    for dtype in given.dtype or ("float32",):
        rows.append(measure(given.density, shape, getattr(torch, dtype), device, given.rounds))
        print(json.dumps(rows[-1], indent=1), flush=True)
    record.write(given.output, shlex.join(["python", *sys.argv]), device, rows)


if __name__ == "__main__":
    main()
