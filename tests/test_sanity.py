"""Outputs that attention cannot give are told apart from all that it can."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from falloff import sanity
from falloff.sanity import OutputError


def qkv(dtype: torch.dtype = torch.float32, tokens: int = 40) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, tokens, 3, 8, generator=generator).to(dtype) for _ in range(3)]


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def judge(q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
    sanity.judge([sanity.look("layer 3, step 12", "broken", q, k, v, out)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", ["random", "constant", "zero", "huge", "tiny", "one outlier"])
def test_attention_passes_whatever_its_values(dtype: torch.dtype, values: str) -> None:
    q, k, v = qkv(dtype)
    if values in ("constant", "zero"):
        v = torch.full_like(v, float(values == "constant"))
    elif values in ("huge", "tiny"):
        v = v * (1e4 if values == "huge" else 1e-5)
    elif values == "one outlier":
        v[:, 7] = 60.0
    judge(q, k, v, attention(q, k, v))
    judge(0 * q, k, v, attention(0 * q, k, v))


def test_mean_over_very_many_tokens_is_not_black() -> None:
    v = torch.randn(1, 300_000, 1, 4, generator=torch.Generator().manual_seed(0))
    judge(v[:, :1], v, v, v.mean(1, keepdim=True).expand_as(v))


def test_padding_may_hold_anything() -> None:
    """Kernels never let it through."""
    q, k, v = qkv()
    out = attention(q, k, v)
    for x in (k, v):
        x[:, -1] = torch.nan
    judge(q, k, v, out)
    v[:, -1] = torch.inf
    judge(q, k, v, out)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: out.mul_(torch.nan), "put out NaN or infinity from finite"),
        (lambda out: out[1, 5, 2].fill_(torch.inf), "put out NaN or infinity from finite"),
        (lambda out: out[:, :, 1].zero_(), "put out nothing"),
        (lambda out: out[:, :, 1].mul_(1e-9), "put out nothing"),
        (lambda out: out[0, 3].fill_(1e3), "put out more than 2 times its largest value"),
    ],
)
def test_black_noise_and_nan_are_named_with_their_call(change: object, words: str) -> None:
    q, k, v = qkv()
    out = attention(q, k, v)
    change(out)
    with pytest.raises(OutputError, match=rf"the first sparse call of layer 3, step 12 by the kernel broken {words}"):
        judge(q, k, v, out)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_model_that_makes_nan_itself_hears_so(which: int) -> None:
    given = qkv()
    given[which][0, 4] = torch.nan
    with pytest.raises(OutputError, match="the model itself made them"):
        judge(*given, attention(*given))


def test_the_first_bad_call_is_the_one_told() -> None:
    q, k, v = qkv()
    good, bad = attention(q, k, v), torch.zeros_like(v)
    looks = [sanity.look(where, "cpu", q, k, v, out) for where, out in (("a", good), ("b", bad), ("c", bad))]
    with pytest.raises(OutputError, match="call of b by"):
        sanity.judge(looks)
    sanity.judge([])
