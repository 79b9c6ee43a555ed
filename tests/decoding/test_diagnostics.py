import pytest
import torch
from decoders import HEIGHT, SIZES, TOKENS, WIDTH, model, orders, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from falloff.decoding.cache import Cache
from falloff.decoding.diagnostics import attention_by_distance, cost, even_attention_by_distance
from falloff.decoding.sampling import Guidance
from falloff.decoding.sizes import group_sizes
from falloff.decoding.steps import decode
from falloff.decoding.transformer import LPDTransformer


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_costs_are_what_decoding_counts(scale: float) -> None:
    made = model()
    found = cost(made, SIZES, guided=scale != 1)
    steps: list[int] = []
    # Of all kernels of attention the counter knows the plain one on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        decode(made, torch.tensor([1]), orders(1), SIZES, guidance=Guidance(scale=scale), on_step=steps.append)
    assert found.flops == counter.get_total_flops()
    assert found.forwards == len(steps)
    cache = Cache(made, 1 if scale == 1 else 2, torch.device("cpu"))
    assert found.cache_bytes == cache.keys.nbytes + cache.values.nbytes


def test_published_model_in_numbers() -> None:
    with torch.device("meta"):
        large = LPDTransformer().to(dtype=torch.bfloat16)
    found = cost(large, group_sizes(256, 20), guided=False)
    assert found.rows == 493
    assert found.cache_bytes / 1e6 == pytest.approx(25.3, abs=0.05)
    one_by_one = cost(large, group_sizes(256, 256), guided=False)
    assert found.forwards == 20
    assert one_by_one.rows == 512
    assert one_by_one.cache_bytes == found.cache_bytes


def test_attention_by_distance_is_the_mean_of_the_pairs() -> None:
    made, places = model(), orders(2)
    tokens, labels = sample(2)
    with torch.no_grad():
        for block in made.blocks:
            block.attn.qkv.weight[:64] = 0  # no content: every visible row gets the same share
            block.attn.qkv.bias[:64] = 0
    found = attention_by_distance(made, tokens, labels, places, SIZES)
    even = even_attention_by_distance(places, SIZES, WIDTH)
    torch.testing.assert_close(found[0], even.to(found.dtype), equal_nan=True, rtol=1e-6, atol=0)
    assert found.shape[0] == 2
    assert found[:, 0].isnan().all()
    shares = torch.tensor([1 / (1 + start + size) for start, size in zip((0, 1, 3, 6, 10), SIZES, strict=True)])
    share = shares.repeat_interleave(torch.tensor(SIZES))
    group = torch.arange(5).repeat_interleave(torch.tensor(SIZES))
    for s in range(1, found.shape[1]):
        rows = []
        for order in places:
            for i in range(TOKENS):
                known = [j for j in range(TOKENS) if group[j] < group[i]]
                ends = [(divmod(int(order[i]), WIDTH), divmod(int(order[j]), WIDTH)) for j in known]
                hits = [round(((a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2) ** 0.5) == s for a, b in ends]
                rows += [share[i]] if any(hits) else []
        torch.testing.assert_close(found[0, s].float(), torch.stack(rows).mean())
    assert found.shape[1] <= 1 + round(((HEIGHT - 1) ** 2 + (WIDTH - 1) ** 2) ** 0.5)
