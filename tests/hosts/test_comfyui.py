"""ComfyUI's hook: what reaches a method, where it stands, and that everything else goes where it went before."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy_standin as comfy
import pytest
import tiny
import torch
from torch import Tensor

import falloff
from falloff.hosts import UnsupportedModelError, comfyui

GRID = (3, 4, 4)
"""Of the stand-in's usual latent, 3 x 8 x 8."""


def radial(**more: Any) -> falloff.Radial:
    return falloff.Radial(block=4, decay=0.05, neighbour="decayed", **more)


def patched(model: comfy.ModelPatcher, method: Any = None, schedule: Any = tiny.ALWAYS, **more: Any) -> Any:
    return comfyui.patch(model, method or tiny.Frames(), schedule=schedule, **more)


def masked(plan: falloff.Plan) -> Any:
    """An override that computes the plan's pairs by a mask, wherever queries and keys number its tokens."""

    def override(
        original: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, **more: Any
    ) -> Tensor:
        axis = 2 if more.get("skip_reshape") else 1
        if q.shape[axis] == k.shape[axis] == plan.q_len:
            mask = plan.mask() if mask is None else plan.mask() & mask
        return original(q, k, v, heads, mask, **more)

    return override


def overridden(model: comfy.ModelPatcher, override: Any) -> comfy.ModelPatcher:
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


@pytest.mark.parametrize("kernel", ["auto", "cpu"])
@pytest.mark.parametrize("kind", [comfy.WanModel, comfy.CameraWanModel, comfy.HunyuanVideo])
def test_all_blocks_and_dense_change_nothing(kind: Any, kernel: str) -> None:
    model = comfy.model(kind)
    plain = comfy.sample(model, comfy.levels())
    torch.testing.assert_close(
        comfy.sample(patched(model, tiny.FULL, kernel=kernel), comfy.levels()), plain, atol=1e-6, rtol=1e-5
    )
    assert torch.equal(comfy.sample(patched(model, falloff.Full()), comfy.levels()), plain)
    assert torch.equal(comfy.sample(model, comfy.levels()), plain)


@pytest.mark.parametrize("kind", [comfy.WanModel, comfy.HunyuanVideo])
@pytest.mark.parametrize("latent", [(3, 8, 8), (5, 7, 9)])
def test_sparse_is_masked_attention_and_the_rest_is_left_alone(kind: Any, latent: tuple[int, int, int]) -> None:
    model = comfy.model(kind)
    ours = patched(model, radial())
    sparse = comfy.sample(ours, comfy.levels(), latent=latent)
    report = comfyui.report(ours)
    assert report.reasons == {}
    assert 0 < report.density < 1
    tokens = latent[0] * -(-latent[1] // 2) * -(-latent[2] // 2)
    assert report.plan.q_len == tokens + (comfy.TEXT if kind is comfy.HunyuanVideo else 0)
    expected = comfy.sample(overridden(model, masked(report.plan)), comfy.levels(), latent=latent)
    torch.testing.assert_close(sparse, expected, atol=1e-5, rtol=1e-4)
    assert (sparse - comfy.sample(model, comfy.levels(), latent=latent)).abs().max() > 1e-3
    assert not comfyui.patch_of(ours).left_alone


def test_layers_steps_and_branches_are_known() -> None:
    ours = patched(comfy.model(comfy.HunyuanVideo), schedule=falloff.Schedule(dense_first=1, dense_layers=(2,)))
    for run in range(2):
        comfy.sample(ours, comfy.levels(), parts=[(0,), (1,)])
        calls = comfyui.report(ours).calls
        assert [(call.run, call.step, call.branch, call.layer) for call in calls] == [
            (run, step, branch, layer) for step in range(4) for branch in ("cond", "uncond") for layer in range(3)
        ]
        assert comfyui.report(ours).reasons == {"dense layer": 8, "dense first step": 4}


def test_both_branches_in_one_batch_are_two_runs_of_one() -> None:
    model = comfy.model()
    together = patched(model, radial())
    both = comfy.sample(together, comfy.levels(1), parts=[(1, 0)])
    assert {call.branch for call in comfyui.report(together).calls} == {"cond_uncond"}
    alone = patched(model, radial())
    generator = torch.Generator().manual_seed(0)
    x, text = (torch.randn(2, *size, generator=generator) for size in ((comfy.DIM, 3, 8, 8), (comfy.TEXT, comfy.DIM)))
    options = {"wrappers": alone.wrappers, **alone.model_options["transformer_options"]}
    with torch.no_grad():
        outs = [model.diffusion_model(x[i : i + 1], None, text[i : i + 1], transformer_options=options) for i in (0, 1)]
    torch.testing.assert_close(torch.cat(outs), both, atol=1e-5, rtol=1e-4)


def test_solvers_that_look_between_two_steps_are_in_the_first_of_them() -> None:
    ours = patched(comfy.model(), schedule=falloff.Schedule(dense_first=1, dense_layers=()))
    comfy.sample(ours, comfy.levels(), at=[1.0, 0.9, 0.75, 0.7501, 0.5, 0.3, 0.25, 0.1])
    steps = [call.step for call in comfyui.report(ours).calls if call.layer == 0]
    assert steps == [0, 0, 1, 1, 2, 2, 3, 3]


def test_run_starts_with_its_noise_levels_or_when_noise_is_back() -> None:
    ours = patched(comfy.model(comfy.WanModel))
    sigmas = comfy.levels()
    runs = []
    for levels in (sigmas, sigmas, comfy.levels(2), comfy.levels(1), comfy.levels(1)):
        comfy.sample(ours, levels)
        report = comfyui.report(ours)
        runs.append((report.calls[0].run, len(report.calls)))
    assert runs == [(0, 8), (1, 8), (2, 4), (3, 2), (4, 2)]


def test_forward_without_noise_levels_is_dense_where_steps_count() -> None:
    model = comfy.model()
    ours = patched(model, schedule=falloff.Schedule(dense_first=0.5, dense_layers=()))
    options = {"wrappers": ours.wrappers, **ours.model_options["transformer_options"]}
    with torch.no_grad():
        model.diffusion_model(
            torch.randn(1, comfy.DIM, 3, 8, 8), None, torch.randn(1, 5, 24), transformer_options=options
        )
    assert comfyui.report(ours).reasons == {"step unknown": 2}


def test_earlier_override_gets_every_call_that_stays_dense() -> None:
    model, calls = comfy.model(), []

    def earlier(original: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(q.shape[1] == k.shape[1])
        return 2 * original(q, k, *args, **kwargs)

    ours = patched(overridden(model, earlier), schedule=falloff.Schedule(dense_first=1, dense_layers=()))
    comfy.sample(ours, comfy.levels(2))
    assert calls == [True, False, True, False, False, False]  # the second step's self-attention is sparse
    dense = patched(overridden(model, earlier), falloff.Full())
    assert torch.equal(comfy.sample(dense, comfy.levels(2)), comfy.sample(overridden(model, earlier), comfy.levels(2)))


def test_second_patch_takes_the_place_of_the_first() -> None:
    model, calls = comfy.model(), []

    def earlier(original: Any, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    first = patched(overridden(model, earlier), tiny.Frames())
    second = patched(first, tiny.Frames(seen=2))
    out = comfy.sample(second, comfy.levels(1))
    assert comfyui.report(second).method == tiny.Frames(seen=2)
    assert comfyui.report(first).calls == []
    assert len(calls) == 2  # cross-attention
    assert torch.equal(out, comfy.sample(patched(model, tiny.Frames(seen=2)), comfy.levels(1)))
    assert not torch.equal(comfy.sample(first, comfy.levels(1)), out)
    dense = patched(first, falloff.Full())
    assert torch.equal(comfy.sample(dense, comfy.levels(1)), comfy.sample(model, comfy.levels(1)))


def test_override_of_a_later_node_is_told() -> None:
    ours = patched(comfy.model())
    taken = overridden(ours, lambda original, *args, **kwargs: original(*args, **kwargs))
    comfy.sample(taken, comfy.levels())
    assert f"{comfyui.NOTHING_SEEN}: 4 calls" in comfyui.describe(ours)
    comfy.sample(ours, comfy.levels())
    assert comfyui.NOTHING_SEEN not in comfyui.describe(ours)


def test_frames_to_continue_from_are_in_the_grid() -> None:
    ours = patched(comfy.model(), radial())
    comfy.sample(ours, comfy.levels(1), None, torch.randn(2, comfy.DIM, 2, 8, 8))
    assert comfyui.report(ours).reasons == {}
    assert comfyui.report(ours).plan.q_len == 5 * 4 * 4


def test_tokens_before_the_video_stay_dense() -> None:
    ours = patched(comfy.model(comfy.HunyuanVideo))
    comfy.sample(ours, comfy.levels(1), None, torch.randn(2, comfy.DIM, 1, 8, 8))
    assert comfyui.report(ours).reasons == {"ref_latent puts tokens before the video's": 3}


def test_mask_over_keys_is_kept_and_others_stay_dense() -> None:
    tokens = 48 + comfy.TEXT
    valid = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    valid[..., -2:] = False
    model = comfy.model(comfy.HunyuanVideo)
    ours = patched(model, radial())
    sparse = comfy.sample(ours, comfy.levels(1), valid)
    expected = comfy.sample(overridden(model, masked(comfyui.report(ours).plan)), comfy.levels(1), valid)
    torch.testing.assert_close(sparse, expected, atol=1e-5, rtol=1e-4)
    added = torch.zeros(1, 1, tokens)
    comfy.sample(ours, comfy.levels(1), added)
    (reason,) = comfyui.report(ours).reasons
    assert reason == f"its mask, torch.float32 of shape (1, 1, 1, {tokens}), is not over keys alone"


def test_layer_that_is_not_told_is_left_alone() -> None:
    model = comfy.model(lambda: comfy.WanModel(told=False))
    ours = patched(model)
    assert torch.equal(comfy.sample(ours, comfy.levels()), comfy.sample(model, comfy.levels()))
    assert "no block_index: this ComfyUI does not tell the layer; a newer one does: 8 calls" in comfyui.describe(ours)


def test_output_may_keep_its_heads_apart() -> None:
    ours = patched(comfy.model())
    patch = comfyui.patch_of(ours)
    q, k, v = torch.randn(3, 2, comfy.HEADS, 48, 12)
    scene = comfyui.Scene(comfyui.FAMILIES[0], ours.diffusion_model, falloff.Grid(*GRID))
    more = {"transformer_options": {"falloff": scene, "block_index": 0}, "scale": 0.1}
    flat = patch.attention(comfy.attention_plain, q, k, v, comfy.HEADS, skip_reshape=True, **more)
    apart = patch.attention(
        comfy.attention_plain, q, k, v, comfy.HEADS, skip_reshape=True, skip_output_reshape=True, **more
    )
    assert torch.equal(apart.transpose(1, 2).flatten(2), flat)
    plan = falloff.plan_for(tiny.Frames(), falloff.Sequence(falloff.Grid(*GRID)))
    torch.testing.assert_close(apart, falloff.attention(q, k, v, plan, scale=0.1))


@pytest.mark.parametrize(
    ("more", "reason"),
    [({"enable_gqa": True}, "grouped queries"), ({"block_type": "new"}, "block_type 'new' is unknown in Wan")],
)
def test_unknown_kinds_of_calls_are_left_alone(more: dict[str, Any], reason: str) -> None:
    patch = comfyui.patch_of(patched(comfy.model()))
    scene = comfyui.Scene(comfyui.FAMILIES[0], comfy.WanModel(), falloff.Grid(*GRID))
    options = {"falloff": scene, "block_index": 0, "block_type": more.pop("block_type", "double")}
    q = torch.randn(1, 48, comfy.DIM)
    out = patch.attention(comfy.attention_plain, q, q, q, heads=2, transformer_options=options, **more)
    assert torch.equal(out, comfy.attention_plain(q, q, q, 2))
    assert patch.left_alone == {reason: 1}


def test_unknown_models_and_kernels_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="families Wan, HunyuanVideo; got Flux"):
        patched(comfy.model(comfy.Flux))
    with pytest.raises(ValueError, match="unknown kernel 'fast'; choose one of auto"):
        patched(comfy.model(), kernel="fast")
    with pytest.raises(ValueError, match="sla as it is set has trained parameters"):
        patched(comfy.model(), falloff.SLA())
    with pytest.raises(ValueError, match="not at work in this MODEL"):
        comfyui.report(comfy.model())


@pytest.fixture(scope="module")
def package() -> ModuleType:
    """The node package, imported from its folder as ComfyUI does."""
    folder = Path(__file__).parents[2] / "integrations/comfyui"
    spec = importlib.util.spec_from_file_location(
        "falloff_nodes", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_nodes_patch_and_report(package: ModuleType) -> None:
    assert set(package.NODE_CLASS_MAPPINGS) == set(package.NODE_DISPLAY_NAME_MAPPINGS)
    radial_node, report_node = package.NODE_CLASS_MAPPINGS.values()
    inputs = radial_node.INPUT_TYPES()["required"]
    defaults = {name: options[0]["default"] for name, (_, *options) in inputs.items() if name != "model"}
    model = comfy.model()
    (ours,) = getattr(radial_node(), radial_node.FUNCTION)(model=model, **defaults)
    assert comfyui.report(ours).method == falloff.Radial()
    assert comfyui.report(ours).schedule == falloff.Schedule().named(None)
    comfy.sample(ours, comfy.levels())
    latent = {"samples": torch.zeros(1)}
    shown = getattr(report_node(), report_node.FUNCTION)(model=ours, latent=latent)
    assert shown["result"][0] is latent
    assert "dense layer: 4 calls" in shown["result"][1]
    assert shown["ui"]["text"] == [shown["result"][1]]


def test_node_settings_reach_the_method(package: ModuleType) -> None:
    node = package.NODE_CLASS_MAPPINGS["FalloffRadialAttention"]()
    (ours,) = node.patch(comfy.model(), decay=0.5, dense_first=0.1, dense_layers=2, block="64", kernel="cpu")
    report = comfyui.report(ours)
    assert report.method == falloff.Radial(decay=0.5, block=64)
    assert report.schedule == falloff.Schedule(dense_first=0.1, dense_layers=(0, 1))
    assert comfyui.patch_of(ours).session.kernel == "cpu"
