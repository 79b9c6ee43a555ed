"""The adapters of vendor kernels driven through the libraries themselves, up to the launch, where there is no GPU.

Tensors stay on the CPU and say that they are on a Hopper GPU. So the libraries check every argument and compile their
kernels for Hopper; nothing runs, and outputs hold no numbers. What an adapter tells a library, and whether that is
right, is tested by stand-ins (``tests/kernels/test_vendor.py``) and, on a GPU, by each kernel's trial.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

os.environ |= {"CUTE_DSL_ARCH": "sm_90a", "FLASH_ATTENTION_ARCH": "sm_90", "FLASH_ATTENTION_NUM_SMS": "132"}

import cutlass
import pytest
import torch
from cutlass import cute
from cutlass.cute import runtime
from torch import Tensor

from falloff.evaluation.bench import dense
from falloff.kernels.trial import Trial
from falloff.kernels.vendor import cudnn, flash4, flashinfer, probe

HOPPER = (9, 0)
SHARED_BYTES = 228 << 10  # of a multiprocessor
TYPES = {
    torch.bfloat16: cutlass.BFloat16,
    torch.float16: cutlass.Float16,
    torch.float32: cutlass.Float32,
    torch.int32: cutlass.Int32,
}
CPU = torch.device("cpu")
LAUNCHED: list[str] = []
"""Names of kernels in their order. Libraries keep what they compiled, so that all tests share it."""


class OnGpu(runtime._FakeTensor):
    """What CuTe makes of a tensor, but for its address, and in a GPU's memory."""

    def __init__(self, tensor: Tensor, align: int, leading: int | None) -> None:
        every = max(1, align // tensor.element_size())
        stride = [0 if step == 0 else cute.sym_int64(divisibility=every) for step in tensor.stride()]
        if leading is not None:
            stride[leading] = 1
        shape = tuple(cute.sym_int(width=32) for _ in tensor.shape)
        super().__init__(TYPES[tensor.dtype], shape, stride=tuple(stride), assumed_align=align)
        self._made_of = tensor, align

    def mark_layout_dynamic(self, leading_dim: int | None = None) -> OnGpu:
        tensor, align = self._made_of
        return OnGpu(tensor, align, innermost(tensor) if leading_dim is None else leading_dim)


def innermost(tensor: Tensor) -> int | None:
    return next((i for i, step in enumerate(tensor.stride()) if step == 1), None)


def from_dlpack(tensor: Tensor, assumed_align: int | None = None, **unused: Any) -> OnGpu:
    return OnGpu(tensor, assumed_align or tensor.element_size(), innermost(tensor))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Hopper GPU in name. Gives the names of the kernels that would have been launched, in their order."""
    from cudnn import BSA
    from cudnn.block_sparse_attention import _interface, api
    from cudnn.block_sparse_attention.csrc.bwd import bucketed_k2q_csr
    from cutlass.base_dsl.runtime import cuda as driver
    from flash_attn.cute import interface

    assert all((BSA, interface))  # imported, so that their names can be replaced
    LAUNCHED.clear()
    properties = SimpleNamespace(multi_processor_count=132)
    for name, value in {
        "get_device_capability": HOPPER,
        "get_device_properties": properties,
        "current_device": 0,
        "current_stream": SimpleNamespace(cuda_stream=0),
        "device": contextlib.nullcontext(),
        "synchronize": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(probe, "arch", lambda device=None: 90)
    monkeypatch.setattr(driver, "get_device_attribute", lambda *_: SHARED_BYTES)
    monkeypatch.setattr(bucketed_k2q_csr, "_device_capability", lambda index: HOPPER)
    monkeypatch.setattr(api, "_device_arch", lambda tensor: 90)
    everywhere(monkeypatch, runtime.from_dlpack, from_dlpack)
    compiling = cute.compile

    def compiled(kernel: Any, *given: Any, **more: Any) -> Callable[..., None]:
        compiling(kernel, *given, **more)
        name = getattr(kernel, "__name__", type(kernel).__name__)
        return lambda *_, **__: LAUNCHED.append(name)

    monkeypatch.setattr(cute, "compile", compiled)
    assert _interface.cute.compile is compiled
    return LAUNCHED


def everywhere(monkeypatch: pytest.MonkeyPatch, old: Any, new: Any) -> None:
    """Replace a function under every name that a module gave it."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                monkeypatch.setattr(module, name, new)


def trial(head_dim: int = 128, block: int = 128, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Trial:
    return Trial(CPU, dtype, head_dim, block, block, **more)


TRIALS = {
    "whole": trial(ragged=(False, False)),
    "ragged": trial(),
    "gradients": trial(grad=True, lse=False),
    "one map, gradients": trial(grad=True, lse=False, own_maps=(False, False)),
    "maps of each entry": trial(own_maps=(True, True)),
    "float16": trial(dtype=torch.float16),
    "heads of 64": trial(64),
    "nothing seen": trial(partial=True),
}
CUDNN = TRIALS | {"blocks of 64": trial(block=64), "blocks of 64, gradients": trial(block=64, grad=True, lse=False)}
FLASH4 = TRIALS | {"LSE and gradients": trial(grad=True), "heads of 64, gradients": trial(64, grad=True)}


def answer(adapter: Any, trial: Trial) -> None:
    """Both of a trial's calls, with their gradients where it has them; what comes back must have its shape."""
    for plan in trial.plans():
        q, k, v = (x.requires_grad_(trial.grad) for x in trial.tensors(plan))
        out, lse = adapter.attention(plan, q, k, v, 0.1, None)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        if trial.grad:
            total = out.float().sum() + (lse.sum() if trial.lse else 0)
            grads = torch.autograd.grad(total, (q, k, v))
            assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.parametrize("name", CUDNN)
def test_cudnn_frontend(hopper: list[str], name: str) -> None:
    trial = CUDNN[name]
    answer(cudnn, trial)
    end = f"Sm90Blk{trial.q_block}"
    expected = [f"BlockSparseAttnForward{end}"]
    if trial.grad:
        expected += ["BucketedK2QCsrUniversal", f"BlockSparseAttnBackward{end}"]
    assert hopper == 2 * expected


@pytest.mark.parametrize("name", FLASH4)
def test_flash_attention_4(hopper: list[str], name: str) -> None:
    trial = FLASH4[name]
    answer(flash4, trial)
    assert hopper.count("FlashAttentionForwardSm90") == 2
    assert hopper.count("FlashAttentionBackwardSm90") == 2 * trial.grad


def test_flash_attention_4_as_the_dense_peer_of_benchmarks(hopper: list[str]) -> None:
    attend = dense._foreign(dense.FOREIGN["flash-attention 4"])
    shape = trial(grad=True)
    q, k, v = (x.requires_grad_() for x in shape.tensors(shape.plans()[0]))
    out = attend(q, k, v)
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    grads = torch.autograd.grad(out.float().sum(), (q, k, v))
    assert [grad.shape for grad in grads] == [q.shape, k.shape, v.shape]
    assert [hopper.count(f"FlashAttention{way}Sm90") for way in ("Forward", "Backward")] == [1, 1]


@pytest.mark.parametrize("name", [name for name, each in TRIALS.items() if not each.grad])
def test_flashinfer(hopper: list[str], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Its kernels are CUDA C++ that is compiled on the machine that runs it, so it is followed to their door."""
    from flashinfer import sparse

    class Module:
        def __getattr__(self, function: str) -> Callable[..., Tensor]:
            def called(*given: Any) -> Tensor:
                hopper.append(function)
                return torch.zeros(1)

            return called

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **more: empty(*sizes, **more))
    monkeypatch.setattr(sparse, "get_batch_prefill_module", lambda backend, *types: Module())
    monkeypatch.setattr(sparse, "get_compute_capability", lambda device: HOPPER)
    monkeypatch.setattr(sparse, "determine_attention_backend", lambda *_, **__: "fa3")
    monkeypatch.setattr(sparse, "device_support_pdl", lambda device: False)
    answer(flashinfer, TRIALS[name])
    assert set(hopper) == {"plan", "paged_run"}
    assert hopper.count("plan") == 2
