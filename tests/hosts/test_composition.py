"""What users combine: adapters, fused projections, casting, offload, step caches, checkpointing, copies, files."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.hooks import TaylorSeerCacheConfig, apply_group_offloading
from families import FAMILIES, Family, run
from peft import LoraConfig
from torch import Tensor, nn

import falloff


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def method(family: Family) -> tiny.Frames:
    return tiny.Frames(rows=family.image)


def arguments(family: Family, seed: int = 0) -> dict[str, Any]:
    return family.arguments((1, 4, 5) if family.image else (3, 4, 5), 2, seed)


def sparse_layers(model: nn.Module) -> list[int]:
    calls = falloff.report(model).calls
    assert all(call.reason is None for call in calls)
    return sorted(call.layer for call in calls)


def agrees(family: Family, change: Callable[[nn.Module], Any], tolerance: float = 0.0) -> nn.Module:
    """A change before and after ``enable`` gives one sparse result, and ``disable`` leaves the changed model."""
    outs, model = [], nn.Module()
    for first in (True, False):
        model = family.build()
        torch.manual_seed(7)
        if first:
            change(model)
        falloff.enable(model, method(family))
        if not first:
            change(model)
        outs.append(run(model, arguments(family)))
        assert sparse_layers(model) == list(range(family.layers))
        falloff.disable(model)
        dense = run(model, arguments(family))
        assert (dense - outs[-1]).abs().max() > 1e-4
    torch.testing.assert_close(outs[0], outs[1], atol=tolerance, rtol=0)
    plain = family.build()
    torch.manual_seed(7)
    change(plain)
    torch.testing.assert_close(dense, run(plain, arguments(family)), atol=tolerance, rtol=0)
    return model


def adapter(model: Any) -> LoraConfig:
    """Of the query and value projections, by the names of the family."""
    if not hasattr(model, "add_adapter"):
        pytest.skip("diffusers has no adapters for it")
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return LoraConfig(
        r=2, target_modules=sorted(names & {"to_q", "to_v", "to_query", "to_value"}), init_lora_weights=False
    )


def test_lora(family: Family) -> None:
    def adapt(model: Any) -> None:
        config = adapter(model)
        model.add_adapter(config)

    agrees(family, adapt)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_lora_swapped_and_fused_while_enabled(family: Family) -> None:
    model = falloff.enable(family.build(), method(family))
    plain = run(model, arguments(family))
    config = adapter(model)
    torch.manual_seed(7)
    for name in ("one", "two"):
        model.add_adapter(config, adapter_name=name)
    outs = []
    for name in ("one", "two", "one"):
        model.set_adapter(name)
        outs.append(run(model, arguments(family)))
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])
    model.fuse_lora()
    torch.testing.assert_close(run(model, arguments(family)), outs[0], atol=1e-4, rtol=1e-4)
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(run(model, arguments(family)), plain, atol=1e-4, rtol=1e-4)
    assert set(sparse_layers(model)) == set(range(family.layers))


def test_fused_projections() -> None:
    for name in ("CogVideoX", "FLUX.1", "Wan"):
        model = FAMILIES[name].build()
        model.fuse_qkv_projections()
        fused = falloff.enable(model, method(FAMILIES[name]))
        apart = falloff.enable(FAMILIES[name].build(), method(FAMILIES[name]))
        torch.testing.assert_close(
            run(fused, arguments(FAMILIES[name])), run(apart, arguments(FAMILIES[name])), atol=1e-5, rtol=1e-4
        )


def test_layerwise_casting(family: Family) -> None:
    def cast(model: Any) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    agrees(family, cast)


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(family: Family, kind: str) -> None:
    def offload(model: nn.Module) -> None:
        cpu = torch.device("cpu")
        blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
        apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)

    agrees(family, offload)


@pytest.mark.parametrize("kind", ["sequential", "model"])
def test_cpu_offload(family: Family, kind: str) -> None:
    """The hooks behind ``enable_sequential_cpu_offload`` and ``enable_model_cpu_offload``: weights come and go."""
    hooks: list[Any] = []

    def offload(model: nn.Module) -> None:
        cpu = torch.device("cpu")
        if kind == "sequential":
            accelerate.cpu_offload(model, cpu, offload_buffers=True)
            assert all(parameter.is_meta for parameter in model.parameters())
        else:
            hooks.append(accelerate.cpu_offload_with_hook(model, cpu)[1])

    model = agrees(family, offload)
    assert kind == "sequential" or hasattr(model, "_hf_hook")
    assert kind == "model" or all(parameter.is_meta for parameter in model.parameters())
    for hook in hooks:
        hook.offload()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(run(model, arguments(family)), run(family.build(), arguments(family)), atol=0, rtol=0)


def offload_pipeline(pipe: Any, kind: str) -> None:
    """The CPU in the accelerator's place; for sequential offload diffusers would call it cpu:0, which fails there."""
    if kind == "model":
        pipe.enable_model_cpu_offload(device="cpu")
    else:
        for part in (pipe.transformer, pipe.transformer_2, pipe.vae):
            accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=bool(part._parameters))
    assert hasattr(pipe.transformer_2.proj_out if kind == "sequential" else pipe.transformer_2, "_hf_hook")


@pytest.mark.parametrize("kind", ["sequential", "model"])
@pytest.mark.parametrize("first", [True, False])
def test_offloaded_pipeline(kind: str, first: bool) -> None:
    """Two experts, offloaded before and after ``enable``, and left again."""
    plain = tiny.generate(tiny.t2v(experts=2))
    sparse = tiny.generate(falloff.enable(tiny.t2v(experts=2), tiny.Frames()))
    pipe = tiny.t2v(experts=2)
    steps = [partial(offload_pipeline, pipe, kind), partial(falloff.enable, pipe, tiny.Frames())]
    for step in steps if first else reversed(steps):
        step()
    assert torch.equal(tiny.generate(pipe), sparse)
    report = falloff.report(pipe)
    assert {call.model for call in report.calls} == {0, 1}
    assert report.reasons == {}
    falloff.disable(pipe)
    assert torch.equal(tiny.generate(pipe), plain)


def gradients(model: nn.Module, family: Family) -> dict[str, Tensor]:
    model.zero_grad()
    given = arguments(family)
    with torch.autocast("cpu", enabled=False):
        model(**given)[0].square().mean().backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for float32, which the CPU has anyway
def test_gradient_checkpointing(family: Family) -> None:
    model = falloff.enable(family.build().train(), method(family))
    straight = gradients(model, family)
    model.enable_gradient_checkpointing()
    again = gradients(model, family)
    assert straight.keys() == again.keys()
    for name, gradient in straight.items():
        torch.testing.assert_close(again[name], gradient, atol=1e-6, rtol=1e-4)
    assert len(sparse_layers(model)) == 3 * family.layers


def steps(model: Any, family: Family, count: int) -> list[Tensor]:
    """Forwards of one run, as a pipeline would make them."""
    outs = []
    given = arguments(family)
    for step in range(count):
        timestep = torch.full_like(given["timestep"], 0) + given["timestep"] * (count - step) / count
        with model.cache_context("cond"):
            outs.append(run(model, {**given, "timestep": timestep}))
    return outs


def by_step(model: nn.Module, family: Family) -> list[list[int]]:
    calls = falloff.report(model).calls
    assert all(call.reason is None for call in calls)
    count = max(call.step for call in calls) + 1
    return [sorted(call.layer for call in calls if call.step == step) for step in range(count)]


def cached(family: Family, config: Any, count: int) -> tuple[nn.Module, list[list[int]]]:
    """A model with a step cache, and the layers that attended at every step; dense again, it is as without us."""
    model, plain = family.build(), family.build()
    try:
        plain.enable_cache(config)
        expected = steps(plain, family, count)
    except (ValueError, TypeError, AttributeError) as error:
        pytest.skip(f"diffusers cannot do it with this model: {error}")
    falloff.enable(model, method(family))
    model.enable_cache(config)
    outs = steps(model, family, count)
    seen = by_step(model, family)
    assert not torch.equal(outs[0], expected[0])
    falloff.disable(model)
    model._reset_stateful_cache()
    for ours, theirs in zip(steps(model, family, count), expected, strict=True):
        assert torch.equal(ours, theirs)
    return model, seen


def fewer_later(name: str, config: Any) -> None:
    """A cache of four steps: every layer attends in the first, and some of them not in all that follow."""
    layers = FAMILIES[name].layers
    _, seen = cached(FAMILIES[name], config, 4)
    assert seen[0] == list(range(layers))
    assert sum(map(len, seen)) < 4 * layers


def test_first_block_cache(family: Family) -> None:
    _, seen = cached(family, FirstBlockCacheConfig(threshold=1e9), 3)
    assert seen[0] == list(range(family.layers))
    assert 0 in seen[1]
    assert seen[1] == seen[2] != seen[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_pyramid_attention_broadcast(name: str) -> None:
    config = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: 500,
    )
    fewer_later(name, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_taylorseer(name: str) -> None:
    layers = [r"(\w+_)?blocks\.\d+\.(attn1?|self_attention)"]  # its own patterns miss most of these
    config = TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, cache_identifiers=layers)
    fewer_later(name, config)


@pytest.mark.parametrize("name", FAMILIES)
def test_magcache(name: str) -> None:
    config = MagCacheConfig(num_inference_steps=4, retention_ratio=0.25, mag_ratios=[1.0] * 4, threshold=1.0)
    fewer_later(name, config)


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # diffusers' own
def test_fastercache() -> None:
    config = FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks",),
        attention_weight_callback=lambda _: 0.3,
        tensor_format="BFCHW",
        current_timestep_callback=lambda: 500,
    )
    fewer_later("CogVideoX", config)


def test_deep_copy(family: Family) -> None:
    model = family.build()
    plain = run(model, arguments(family))
    falloff.enable(model, method(family))
    sparse = run(model, arguments(family))
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, arguments(family)), sparse)
    falloff.disable(model)
    assert torch.equal(run(model, arguments(family)), plain)
    assert sparse_layers(twin) == list(range(family.layers))
    falloff.disable(twin)
    assert torch.equal(run(twin, arguments(family)), plain)


def test_files_hold_nothing_of_ours(family: Family, tmp_path: Path) -> None:
    model = family.build()
    plain = run(model, arguments(family))
    falloff.enable(model, method(family))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded, arguments(family)), plain)
    assert not hasattr(loaded, "_falloff")
    assert "falloff" not in (tmp_path / "config.json").read_text()


def test_two_families_in_two_threads_do_not_meet() -> None:
    families = [FAMILIES["HunyuanVideo"], FAMILIES["CogVideoX"]]
    models = [falloff.enable(family.build(), method(family)) for family in families]
    alone = [run(model, arguments(family)) for model, family in zip(models, families, strict=True)]
    outs: list[list[Tensor]] = [[], []]
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        outs[number].extend(run(models[number], arguments(families[number])) for _ in range(8))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(outs[number]) == 8
        assert all(torch.equal(out, alone[number]) for out in outs[number])


@pytest.mark.parametrize("name", ["Mochi", "CogVideoX"])
def test_substitute_is_told_when_lost_and_leaves_with_us(name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].build()
    plain = run(model, arguments(family))
    before = [module.processor for module in model.modules() if hasattr(module, "processor")]
    falloff.enable(model, method(family))
    for module in model.modules():
        if hasattr(module, "processor"):
            module.processor._attention_backend = None
    with pytest.raises(falloff.hosts.diffusers.DetachedError, match="2 of 2"):
        run(model, arguments(family))
    falloff.enable(model, method(family), replace=True)
    assert not torch.equal(run(model, arguments(family)), plain)
    falloff.disable(model)
    assert [module.processor for module in model.modules() if hasattr(module, "processor")] == before
    assert torch.equal(run(model, arguments(family)), plain)
