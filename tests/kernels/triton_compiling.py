"""Triton kernels compiled for chips that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from falloff.kernels.triton import width

SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one block of threads may have (CUDA programming guide, compute capabilities)."""
REGISTERS = 1 << 16
POINTERS = (
    dict.fromkeys(("tasks", "entries", "q_order", "kv_order"), "*i32")
    | dict.fromkeys(("start", "order"), "*i64")
    | {"key_valid": "*u8"}
    | dict.fromkeys(("lse", "delta", "d_lse", "factor", "weight", "denominators"), "*fp32")
)
TENSORS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv", "x", "values", "states", "d_x")


class Compiled(NamedTuple):
    """What a kernel takes, and its texts by their names."""

    shared: int
    registers: int
    stack: int
    texts: dict[str, str]


def compile_kernel(
    kernel: Any, arch: int, head_dim: int, dtype: str, constants: dict[str, Any], warps: int, stages: int
) -> Compiled:
    """As a launch would: pointers and strides are multiples of 16, what it does not specialise is not."""
    constants = constants | {"D": head_dim, "WIDTH": width(head_dim)}
    types = dict.fromkeys(TENSORS, "*" + dtype) | POINTERS | dict.fromkeys(("scale", "skip", "eps"), "fp32")
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    specialised = [name for name in names if "*" in types.get(name, "") or re.search("_[bhnt]$", name)]
    specialised = [name for name in specialised if name not in ("start_h", "order_h")]
    source = ASTSource(
        kernel,
        {name: types.get(name, "i32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in specialised},
    )
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        used = subprocess.run([tool, "-res-usage", cubin.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{what}:(\d+)", used)[1]) for what in ("REG", "STACK"))
    texts = {name: compiled.asm[name] for name in ("ttir", "ptx")}
    return Compiled(compiled.metadata.shared, registers, stack, texts)


def assert_offsets_are_64_bit(kernel: Compiled) -> None:
    """A tensor of 2^31 elements is legal: no address of one may come from a 32-bit offset."""
    offsets = re.findall(
        r"tt\.addptr .*ptr<(?:bf16|f32)>.*?, (?:tensor<[0-9x]+x)?(i\d+)>?(?: loc|$)", kernel.texts["ttir"], re.M
    )
    assert offsets
    assert set(offsets) == {"i64"}
