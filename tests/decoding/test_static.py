"""Steps of one shape, compiled as one graph, against steps of their own shapes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from decoders import HEIGHT, SIZES, TOKENS, WIDTH, model, orders, sample, seed, teacher_forced, tokenizer
from torch._dynamo.testing import CompileCounterWithBackend

from falloff.decoding import LPDPipeline
from falloff.decoding.cache import Cache
from falloff.decoding.order import make_orders
from falloff.decoding.sampling import Guidance, Sampler
from falloff.decoding.static import StaticSteps
from falloff.decoding.steps import UNKNOWN, decode


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def test_logits_are_teacher_forced_logits_and_padding_stays_out_of_the_cache() -> None:
    decoder, places = model(), orders(2)
    tokens, labels = sample(2)
    steps = StaticSteps(decoder, backend="eager")
    cache, placed, start, found = steps.begin(2, torch.device("cpu")), tokens.gather(1, places), 0, []
    before = 0
    for size in SIZES:
        asked = places[:, start : start + size]
        logits = steps(cache, labels, placed[:, before:start], places[:, before:start], asked, max(SIZES))
        found.append(logits.clone())
        assert cache.filled == 1 + start
        assert (cache.keys[:, :, :, : 1 + start] != 0).all()
        assert not cache.keys[:, :, :, 1 + start : -1].any()
        assert not cache.values[:, :, :, 1 + start : -1].any()
        before, start = start, start + size
    torch.testing.assert_close(
        torch.cat(found, dim=1), teacher_forced(decoder, tokens, labels, places), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_one_full_graph_decodes_every_image(scale: float) -> None:
    decoder, counter = model(), CompileCounterWithBackend("aot_eager")
    steps, guidance = StaticSteps(decoder, backend=counter), Guidance(scale=scale)
    for number in range(3):  # what an image leaves in the cache must not be seen by the next
        _, labels = sample(2, number)
        places = orders(2, number)
        ways = [
            decode(decoder, labels, places, SIZES, guidance=guidance, generator=seed(number), compiled=compiled)
            for compiled in (steps, None)
        ]
        assert torch.equal(*ways)
    assert counter.frame_count == 1


def test_known_tokens_come_in_a_step_of_their_own() -> None:
    decoder, counter = model(), CompileCounterWithBackend("eager")
    steps, greedy = StaticSteps(decoder, backend=counter), Sampler(temperature=0)
    tokens, labels = sample(2)
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[0] = True
    places = make_orders("locality", HEIGHT, WIDTH, SIZES, 2, seed(4), known_HW=mask)
    known = tokens.masked_fill(~mask.flatten(), UNKNOWN)
    ways = [
        decode(decoder, labels, places, SIZES, sampler=greedy, known_BN=known, compiled=compiled)
        for compiled in (steps, None)
    ]
    assert torch.equal(*ways)
    assert counter.frame_count == 1


def test_the_cache_keeps_its_place() -> None:
    steps = StaticSteps(model(), backend="eager")
    cpu = torch.device("cpu")
    first = steps.begin(2, cpu)
    first.filled = 7
    assert steps.begin(2, cpu) is first
    assert first.filled == 0
    assert steps.begin(4, cpu) is not first
    assert first.keys.shape[3] == 2 + TOKENS
    assert Cache(model(), 2, cpu).keys.shape[3] == 1 + TOKENS


def test_a_pipeline_draws_the_same_compiled(tmp_path: Path) -> None:
    pipe = LPDPipeline(model(torch.float32), tokenizer())
    pipe.set_progress_bar_config(disable=True)
    plain = pipe([0, 3], 5, generator=seed(0), output_type="latent").images
    pipe.compile_decoding(backend="aot_eager")
    assert torch.equal(pipe([0, 3], 5, generator=seed(0), output_type="latent").images, plain)
    pipe.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "transformer", "vae"]


def test_offloaded_models_are_not_compiled() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipe = LPDPipeline(model(torch.float32), tokenizer())
    add_hook_to_module(pipe.transformer, ModelHook())
    with pytest.raises(ValueError, match="the transformer is offloaded"):
        pipe.compile_decoding()
