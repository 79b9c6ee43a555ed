"""Every tile of the table, compiled for its chip without one, fits the chip."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402  -- only where triton is
from triton.compiler import ASTSource  # noqa: E402 - as above

from falloff.kernels.skip import PROTECTED  # noqa: E402 - as above
from falloff.kernels.triton import width  # noqa: E402 - as above
from falloff.kernels.triton_backward import delta_kernel, dkv_kernel, dq_kernel  # noqa: E402 - as above
from falloff.kernels.triton_forward import forward_kernel  # noqa: E402 - as above
from falloff.kernels.triton_tiles import FULL, HALF, HEAD_DIMS, Tile, whole_blocks  # noqa: E402 - as above

KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
"""Bytes of shared memory that one block of threads may have (CUDA programming guide, compute capabilities)."""
REGISTERS = 1 << 16
POINTERS = dict.fromkeys(("tasks", "entries", "q_order", "kv_order"), "*i32") | {
    "start": "*i64",
    "key_valid": "*u8",
    "lse": "*fp32",
    "delta": "*fp32",
    "d_lse": "*fp32",
}
TENSORS = ("q", "k", "v", "out", "d_out", "dq", "dk", "dv")


class Row(NamedTuple):
    arch: int
    phase: str
    head_dim: int
    dtype: str
    tile: Tile
    plain: bool = True
    skips: bool = False

    def __str__(self) -> str:
        kind = ("" if self.plain else "-packed") + ("-skip" if self.skips else "")
        return f"{self.arch}-{self.phase}-{self.head_dim}-{self.dtype}-{self.tile.own}x{self.tile.other}{kind}"


class Compiled(NamedTuple):
    """What a kernel takes, and its texts by their names."""

    shared: int
    registers: int
    stack: int
    texts: dict[str, str]


ROWS = [
    *(Row(arch, *key, "bf16", tile) for arch, rows in HALF.items() for key, tiles in rows.items() for tile in tiles),
    *(Row(arch, phase, HEAD_DIMS[-1], "fp32", FULL) for arch in HALF for phase in KERNELS),
    *(Row(arch, phase, 128, "bf16", HALF[arch][phase, 128][0], plain=False) for arch in HALF for phase in KERNELS),
    *(
        Row(arch, "forward", head_dim, "bf16", tile, skips=True)
        for arch, q_size, kv_size, head_dim in (
            (80, 128, 64, 128),
            (89, 128, 64, 128),
            (90, 128, 16, 128),
            (120, 64, 32, 256),
        )
        if (tile := whole_blocks(arch, head_dim, torch.bfloat16, q_size, kv_size)) is not None
    ),
]


def compile_row(row: Row) -> Compiled:
    tile = row.tile
    constants = {
        "OWN": tile.own,
        "OTHER": tile.other,
        "UNIT": tile.other if row.skips else 128 if row.plain else 16,
        "PACKED": not row.plain,
        "Q_ORDERED": not row.plain,
        "KV_ORDERED": not row.plain,
        "VALID": not row.plain,
    }
    if row.phase == "forward":
        constants["PROTECTED"] = PROTECTED if row.skips else None
    return compile_kernel(KERNELS[row.phase], row.arch, row.head_dim, row.dtype, constants, tile.warps, tile.stages)


def compile_kernel(
    kernel: Any, arch: int, head_dim: int, dtype: str, constants: dict[str, Any], warps: int, stages: int
) -> Compiled:
    """As a launch would: pointers and strides are multiples of 16, what it does not specialise is not."""
    constants = constants | {"D": head_dim, "WIDTH": width(head_dim)}
    types = dict.fromkeys(TENSORS, "*" + dtype) | POINTERS | {"scale": "fp32", "skip": "fp32"}
    types |= dict.fromkeys(constants, "constexpr")
    names = kernel.arg_names
    specialised = [name for name in names if "*" in types.get(name, "") or re.search("_[bhn]$", name)]
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


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Iterator[dict[Row, Future[Compiled]]]:
    """The rows of this run's tests, compiled two at a time; in processes, since threads upset Python's own parser."""
    chosen = [item.callspec.params.get("row") for item in request.session.items if hasattr(item, "callspec")]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        yield {row: pool.submit(compile_row, row) for row in chosen if isinstance(row, Row)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_tile_fits_its_chip(row: Row, compiled: dict[Row, Future[Compiled]]) -> None:
    kernel = compiled[row].result()
    assert kernel.shared <= SHARED[row.arch]
    assert kernel.registers * 32 * row.tile.warps <= REGISTERS
    # bytes: with orders and valid keys, whose addresses are loaded, one tile leaves its chip a few registers short
    few = 128 if (row.arch, row.phase, row.plain) == (120, "forward", False) else 64
    assert kernel.stack <= (few if row.dtype == "bf16" else 256), "registers spill"
    if row.arch == 90 and row.dtype == "bf16" and row.tile.own >= 64:
        assert "wgmma" in kernel.texts["ptx"]
    assert_offsets_are_64_bit(kernel)


def assert_offsets_are_64_bit(kernel: Compiled) -> None:
    """A tensor of 2^31 elements is legal: no address of one may come from a 32-bit offset."""
    offsets = re.findall(
        r"tt\.addptr .*ptr<(?:bf16|f32)>.*?, (?:tensor<[0-9x]+x)?(i\d+)>?(?: loc|$)", kernel.texts["ttir"], re.M
    )
    assert offsets
    assert set(offsets) == {"i64"}


def test_the_kernel_before_the_backward_compiles() -> None:
    kernel = compile_kernel(delta_kernel, 90, 128, "bf16", {"TILE": 64, "LSE": True}, 4, 3)
    assert kernel.stack == 0
    assert_offsets_are_64_bit(kernel)
