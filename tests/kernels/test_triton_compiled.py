"""Every tile of the table, compiled for its chip without one, fits the chip."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton_compiling import (  # noqa: E402 - only where triton is
    REGISTERS,
    SHARED,
    Compiled,
    assert_offsets_are_64_bit,
    compile_kernel,
)

from falloff.kernels.skip import PROTECTED  # noqa: E402 - as above
from falloff.kernels.triton_backward import delta_kernel, dkv_kernel, dq_kernel  # noqa: E402 - as above
from falloff.kernels.triton_forward import forward_kernel  # noqa: E402 - as above
from falloff.kernels.triton_linear import LEAST  # noqa: E402 - as above
from falloff.kernels.triton_states import gather_kernel, gradient_kernel, spread_kernel  # noqa: E402 - as above
from falloff.kernels.triton_tiles import FULL, HALF, HEAD_DIMS, LINEAR, Tile, whole_blocks  # noqa: E402 - as above

KERNELS = {"forward": forward_kernel, "dq": dq_kernel, "dkv": dkv_kernel}
TENSOR_CORES = {90: "wgmma.mma_async", 100: "tcgen05.mma"}
"""The instruction for a chip's own tensor cores, which multiplies several times as fast as that of older ones."""
LINEAR_KERNELS = {"gather": gather_kernel, "spread": spread_kernel, "gradient": gradient_kernel}


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


LINEAR_ROWS = [
    Row(arch, phase, most, dtype, tile)
    for dtype, itemsize, archs in (("bf16", 2, tuple(HALF)), ("fp32", 4, (90,)))
    for arch in archs
    for phase in LINEAR_KERNELS
    for most, tile in LINEAR[itemsize].items()
]


def compile_row(row: Row) -> Compiled:
    return (compile_linear if row.phase in LINEAR_KERNELS else compile_attention)(row)


def compile_attention(row: Row) -> Compiled:
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


def compile_linear(row: Row) -> Compiled:
    tile, own = row.tile, {"DIVIDED": True, "LEAST": LEAST} if row.phase == "spread" else {"SCALED": True}
    constants = {"OWN": tile.own, "SLICE": tile.other, "PHI": "softmax", "ORDERED": True, "VALID": True} | own
    kernel = LINEAR_KERNELS[row.phase]
    return compile_kernel(kernel, row.arch, row.head_dim, row.dtype, constants, tile.warps, tile.stages)


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
    if row.arch in TENSOR_CORES and row.dtype == "bf16" and row.tile.own >= 64:
        assert TENSOR_CORES[row.arch] in kernel.texts["ptx"]
    assert_offsets_are_64_bit(kernel)


COUNTED = [row for row in ROWS if row.arch != 100 and row.dtype == "bf16" and not row.skips]
"""Those whose products the PTX names one by one."""


@pytest.mark.parametrize("row", COUNTED, ids=str)
def test_no_warps_repeat_the_products_of_others(row: Row, compiled: dict[Row, Future[Compiled]]) -> None:
    """Each wgmma multiplies 64 rows by some columns over 16 channels, for four warps; each mma 16 by 8, for one."""
    ptx, warps = compiled[row].result().texts["ptx"], row.tile.warps
    columns = re.findall(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16", ptx)
    single = re.findall(r"mma\.sync\.aligned\.m16n8k16", ptx)
    multiplied = 64 * 16 * sum(map(int, columns)) * warps // 4 + 16 * 8 * 16 * len(single) * warps
    loops = 2 if row.plain and row.phase != "dkv" else 1  # one more for the ragged end
    products = {"forward": 2, "dq": 3, "dkv": 4}[row.phase]
    assert multiplied == loops * products * row.tile.own * row.tile.other * row.head_dim


@pytest.mark.parametrize("row", LINEAR_ROWS, ids=str)
def test_linear_attention_fits_every_chip(row: Row, compiled: dict[Row, Future[Compiled]]) -> None:
    kernel = compiled[row].result()
    assert kernel.shared <= SHARED[row.arch]
    assert kernel.registers * 32 * row.tile.warps <= REGISTERS
    assert kernel.stack <= 64, "registers spill"
    assert_offsets_are_64_bit(kernel)


def test_the_kernel_before_the_backward_compiles() -> None:
    kernel = compile_kernel(delta_kernel, 90, 128, "bf16", {"TILE": 64, "LSE": True}, 4, 3)
    assert kernel.stack == 0
    assert_offsets_are_64_bit(kernel)
