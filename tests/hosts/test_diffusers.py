"""The seam in eager mode: what it survives, and that it touches nothing else."""

from __future__ import annotations

import copy
import dataclasses
import threading
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny
import torch
from diffusers import AttentionBackendName, FirstBlockCacheConfig, attention_backend
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from peft import LoraConfig
from torch import Tensor, nn

import falloff
from falloff.hosts import UnsupportedModelError, op
from falloff.hosts.diffusers import DetachedError
from falloff.methods import Call, Dense, Method, State


@pytest.fixture
def model() -> Any:
    return tiny.transformer()


def forward(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**tiny.inputs(**more)).sample
    return out


def sparse_differs(model: nn.Module, plain: Tensor) -> None:
    assert (forward(model) - plain).abs().max() > 1e-4


def test_full_map_is_dense_attention(model: Any) -> None:
    plain = forward(model)
    falloff.enable(model, tiny.FULL, kernel="cpu")
    assert falloff.report(model).calls == []
    assert torch.equal(forward(model), plain)
    assert [call.reason for call in falloff.report(model).calls] == [None, None]


def test_sparse_call_is_masked_attention(model: Any) -> None:
    falloff.enable(model, tiny.Frames())
    sparse = forward(model)
    plan = falloff.report(model).plan
    falloff.disable(model)

    class Masked(WanAttnProcessor):
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if attn.is_cross_attention:
                return super().__call__(attn, hidden_states, *args, **kwargs)
            return super().__call__(attn, hidden_states, attention_mask=plan.mask(), rotary_emb=args[-1])

    model.set_attn_processor(Masked())
    torch.testing.assert_close(sparse, forward(model), atol=1e-6, rtol=1e-5)


def test_one_plan_for_every_layer_and_step(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = []
    monkeypatch.setattr(
        tiny.Frames, "plan", lambda self, *a, _plan=tiny.Frames.plan: plans.append(1) or _plan(self, *a)
    )
    pipe = tiny.t2v(layers=3, experts=2)
    falloff.enable(pipe, tiny.Frames())
    tiny.generate(pipe)
    first = falloff.report(pipe).plan
    tiny.generate(pipe)
    assert falloff.report(pipe).plan is first
    assert len(plans) == 1


def test_positional_arguments_are_read(model: Any) -> None:
    falloff.enable(model, tiny.Frames())
    values = tiny.inputs()
    with torch.no_grad():
        model(values["hidden_states"], values["timestep"], values["encoder_hidden_states"])
    assert falloff.report(model).plan is not None


def test_forward_without_its_hooks_stays_dense(model: Any) -> None:
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    with torch.no_grad():
        assert torch.equal(model.forward(**tiny.inputs()).sample, plain)
    assert falloff.report(model).reasons == {"grid unknown": 2}


def test_tokens_that_do_not_fit_the_grid_stay_dense(model: Any) -> None:
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    model._falloff.host = dataclasses.replace(model._falloff.host, grid=lambda given, config: (3, 8, 8))
    assert torch.equal(forward(model), plain)
    assert falloff.report(model).reasons == {"48 tokens do not fit the grid 3x8x8 of 192": 2}


def test_unknown_step_stays_dense_unless_no_step_does(model: Any) -> None:
    falloff.enable(model, tiny.Frames(), schedule=falloff.Schedule(dense_first=1, dense_layers=()))
    forward(model)
    assert falloff.report(model).reasons == {"step unknown": 2}


@pytest.mark.parametrize("change", ["backend", "processor", "one processor"])
def test_lost_marks_are_told_by_the_next_forward(model: Any, change: str) -> None:
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    if change == "backend":
        model.set_attention_backend("native")
    elif change == "processor":
        model.set_attn_processor(WanAttnProcessor())
    else:
        model.blocks[1].attn1.set_processor(WanAttnProcessor())
    lost = 1 if change == "one processor" else 2
    with pytest.raises(DetachedError, match=f"{lost} of 2 self-attention layers no longer run through falloff"):
        forward(model)
    falloff.enable(model, tiny.Frames(), replace=True)
    sparse_differs(model, plain)
    falloff.disable(model)
    assert torch.equal(forward(model), plain)


def test_dense_calls_go_to_the_backend_of_the_user(model: Any) -> None:
    model.set_attention_backend("_native_math")
    try:
        falloff.enable(model, "dense")
        forward(model)
        assert set(falloff.report(model).kernels) == {"_native_math"}
        falloff.disable(model)
        assert model.blocks[0].attn1.processor._attention_backend is AttentionBackendName._NATIVE_MATH
    finally:
        model.reset_attention_backend()
        tiny.transformer().set_attention_backend("native")
    falloff.enable(model, "dense")
    with attention_backend("_native_math"):
        forward(model)
    assert set(falloff.report(model).kernels) == {"_native_math"}
    forward(model)
    assert set(falloff.report(model).kernels) == {"_native_math", "native"}


def test_shared_processor_marks_self_attention_alone(model: Any) -> None:
    shared = WanAttnProcessor()
    model.set_attn_processor(shared)
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    sparse_differs(model, plain)
    assert len(falloff.report(model).calls) == 2
    falloff.disable(model)
    assert all(processor is shared for processor in model.attn_processors.values())
    assert torch.equal(forward(model), plain)


def test_other_models_never_come_here(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    falloff.enable(model, tiny.Frames())
    other = tiny.transformer()
    monkeypatch.setattr(op, "attend", None)
    forward(other)
    with pytest.raises(TypeError, match="NoneType"):
        forward(model)


def test_two_models_in_two_threads_do_not_meet() -> None:
    grids = [(3, 4, 4), (2, 6, 4)]
    models = [tiny.transformer(layers=4, seed=seed) for seed in (0, 1)]
    alone = []
    for model, grid in zip(models, grids, strict=True):
        falloff.enable(model, tiny.Frames())
        alone.append(forward(model, grid=grid))
    outs: list[list[Tensor]] = [[], []]
    barrier = threading.Barrier(2)

    def work(number: int) -> None:
        barrier.wait()
        outs[number].extend(forward(models[number], grid=grids[number]) for _ in range(10))

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        assert len(outs[number]) == 10
        assert all(torch.equal(out, alone[number]) for out in outs[number])


@pytest.mark.parametrize("first", [False, True])
def test_lora_before_and_after_enable(model: Any, first: bool) -> None:
    if not first:
        falloff.enable(model, tiny.Frames())
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    if first:
        falloff.enable(model, tiny.Frames())
    sparse = forward(model)
    assert falloff.report(model).reasons == {}
    assert len(falloff.report(model).calls) == 2
    falloff.disable(model)
    plain = forward(model)
    assert (sparse - plain).abs().max() > 1e-4
    with falloff.using(model, "dense"):
        assert torch.equal(forward(model), plain)


def test_fused_projections(model: Any) -> None:
    falloff.enable(model, tiny.Frames())
    apart = forward(model)
    model.fuse_qkv_projections()
    torch.testing.assert_close(forward(model), apart, atol=1e-6, rtol=1e-5)
    assert len(falloff.report(model).calls) == 4


def test_first_block_cache_skips_what_it_skips() -> None:
    pipe = tiny.t2v(layers=4)
    falloff.enable(pipe, tiny.Frames())
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    tiny.generate(pipe, steps=3, guidance=1.0)
    layers = [[call.layer for call in falloff.report(pipe).calls if call.step == step] for step in range(3)]
    assert layers == [[0, 1, 2, 3], [0], [0]]
    pipe.transformer.disable_cache()
    tiny.generate(pipe, steps=3, guidance=1.0)
    assert len(falloff.report(pipe).calls) == 12
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    falloff.disable(pipe)
    pipe.transformer.disable_cache()
    assert not pipe.transformer._diffusers_hook.hooks


def test_deep_copy_of_a_model_is_independent(model: Any) -> None:
    plain = forward(model)
    falloff.enable(model, tiny.Frames())
    sparse = forward(model)
    twin = copy.deepcopy(model)
    assert falloff.report(twin).calls == []
    assert torch.equal(forward(twin), sparse)
    assert len(falloff.report(twin).calls) == len(falloff.report(model).calls) == 2
    with torch.no_grad():
        twin.proj_out.bias += 1
    assert not torch.equal(forward(twin), sparse)
    assert torch.equal(forward(model), sparse)
    falloff.disable(model)
    assert torch.equal(forward(model), plain)
    assert falloff.report(twin).plan is not None
    falloff.disable(twin)
    sparse_twin = forward(twin)
    assert not torch.equal(sparse_twin, sparse)
    assert not twin.blocks[0].attn1._forward_pre_hooks


def test_deep_copy_of_a_pipeline_follows_its_own_run() -> None:
    pipe = falloff.enable(tiny.t2v(experts=2), tiny.Frames(), schedule=falloff.Schedule(dense_first=1))
    twin = copy.deepcopy(pipe)
    assert torch.equal(tiny.generate(twin), tiny.generate(pipe))
    assert falloff.report(twin).reasons == falloff.report(pipe).reasons
    assert {call.step for call in falloff.report(twin).calls} == {0, 1, 2, 3}
    assert falloff.report(twin).plan is not falloff.report(pipe).plan


def test_failure_leaves_nothing_attached(model: Any) -> None:
    plain = forward(model)

    class Direct:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any) -> Tensor:
            return hidden_states

    broken = tiny.transformer(seed=1)
    broken.blocks[1].attn1.set_processor(Direct())
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.attn1 has the processor Direct"):
        falloff.enable([model, broken], tiny.Frames())
    for one in (model, broken):
        assert not hasattr(one, "_falloff")
        assert not one._forward_pre_hooks
        assert not one.blocks[0].attn1._forward_pre_hooks
        assert "_attention_backend" not in vars(one.blocks[0].attn1.processor)
    assert torch.equal(forward(model), plain)


def gradients(model: Any, **more: Any) -> list[Tensor]:
    model.zero_grad()
    model(**tiny.inputs(**more)).sample.square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_flow(model: Any, checkpointing: bool) -> None:
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    plain = gradients(model)
    falloff.enable(model, tiny.FULL, kernel="cpu")
    torch.testing.assert_close(gradients(model), plain, atol=1e-6, rtol=1e-4)
    falloff.enable(model, "dense", replace=True)
    for ours, theirs in zip(gradients(model), plain, strict=True):
        assert torch.equal(ours, theirs)


def test_checkpointed_gradients_are_those_of_the_sparse_forward(model: Any) -> None:
    model.train()
    falloff.enable(model, tiny.Frames())
    straight = gradients(model)
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradients(model), straight, atol=1e-7, rtol=1e-5)


@dataclass(frozen=True, kw_only=True)
class Counting(Method):
    """Keeps a count in its state, and looks at q."""

    name: ClassVar[str] = "counting"
    schedule: ClassVar[falloff.Schedule] = tiny.ALWAYS

    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Dense:
        state.values["calls"] = state.values.get("calls", 0) + 1
        assert q_BHND.shape[1:] == (2, call.sequence.tokens, 12)
        return Dense(f"call {state.values['calls']} of layer {call.layer} of {call.layers}, {call.branch}")


def test_state_is_of_one_layer_and_branch_and_one_run() -> None:
    pipe = tiny.t2v()
    falloff.enable(pipe, Counting())
    for _ in range(2):
        tiny.generate(pipe, steps=2)
        assert falloff.report(pipe).reasons == {
            f"call {call} of layer {layer} of 2, {branch}": 1
            for call in (1, 2)
            for layer in (0, 1)
            for branch in ("cond", "uncond")
        }
