"""Parameters that a method has learned: made, trained, saved, loaded and forgotten, on tiny models."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import FAMILIES, run
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import falloff
from falloff import SLA, SLA2, VSA, Method, Schedule
from falloff.api import BranchError, NotEnabledError
from falloff.hosts import UnsupportedModelError
from falloff.hosts.layers import layer_of
from falloff.methods.branch import Layer
from falloff.session import MethodError
from falloff.trained import Trained

GATED = VSA(gate=True, tile=(1, 2, 2), sparsity=0.7)
METHODS: list[Method] = [
    SLA(q_block=16, kv_block=8, density=0.2),
    SLA2(q_block=16, kv_block=8, density=0.2),
    GATED,
]
GRIDS = {"Wan": (3, 4, 4), "HunyuanVideo": (3, 4, 4), "FLUX.1": (1, 8, 8)}
by_name = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def forward(model: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**tiny.inputs(**more), return_dict=False)[0]
    return out


def train_a_little(model: Any, seed: int = 0) -> None:
    """Other numbers than those that change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in falloff.branches(model).parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("name", GRIDS)
@by_name
def test_every_parameter_learns_and_nothing_stays(method: Method, name: str) -> None:
    family, model = FAMILIES[name], FAMILIES[name].build().requires_grad_(False)
    arguments = family.arguments(GRIDS[name], batch=2)
    dense, state = run(model, arguments), set(model.state_dict())
    falloff.enable(model, method, schedule=tiny.ALWAYS)
    branches = falloff.branches(model)
    assert list(branches["0"]) == [str(layer) for layer in range(family.layers)]
    assert set(model.state_dict()) == state
    before = run(model, arguments)
    trained = [parameter for parameter in branches.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.05)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        outputs = model(**arguments)
        loss = (outputs[0] if isinstance(outputs, tuple) else outputs).square().mean()
        loss.backward()
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert not torch.allclose(run(model, arguments), before)
    falloff.disable(model)
    assert torch.equal(run(model, arguments), dense)
    with pytest.raises(NotEnabledError):
        falloff.branches(model)


@by_name
def test_pipelines_with_two_experts(method: Method, tmp_path: Path) -> None:
    pipe = tiny.t2v(experts=2)
    dense = tiny.generate(pipe)
    falloff.enable(pipe, method, schedule=tiny.ALWAYS)
    fresh = tiny.generate(pipe)
    train_a_little(pipe)
    trained = tiny.generate(pipe)
    assert not torch.allclose(trained, fresh)
    assert list(falloff.branches(pipe)) == ["0", "1"]
    second = falloff.branches(pipe.transformer_2)
    assert second["0"]["1"] is falloff.branches(pipe)["1"]["1"]
    falloff.save_branches(pipe, tmp_path / "both.safetensors")
    falloff.save_branches(pipe.transformer_2, tmp_path / "second.safetensors")
    falloff.disable(pipe)
    assert torch.equal(tiny.generate(pipe), dense)
    falloff.enable(pipe, method, schedule=tiny.ALWAYS)
    assert torch.equal(tiny.generate(pipe), fresh)
    falloff.load_branches(pipe, tmp_path / "both.safetensors")
    assert torch.equal(tiny.generate(pipe), trained)
    wanted = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    falloff.enable(pipe, method, schedule=tiny.ALWAYS, replace=True)
    falloff.load_branches(pipe.transformer_2, tmp_path / "second.safetensors")
    loaded = falloff.branches(pipe.transformer_2).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in wanted.items())
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".safetensors"]


@by_name
def test_a_copy_has_parameters_of_its_own(method: Method) -> None:
    model = tiny.transformer()
    falloff.enable(model, method, schedule=tiny.ALWAYS)
    train_a_little(model)
    twin = copy.deepcopy(model)
    trained = forward(model)
    assert torch.equal(forward(twin), trained)
    train_a_little(twin, seed=1)
    assert not torch.allclose(forward(twin), trained)
    assert torch.equal(forward(model), trained)


@by_name
def test_making_them_draws_no_random_numbers(method: Method) -> None:
    model = tiny.transformer()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    falloff.enable(model, method, schedule=tiny.ALWAYS)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # Wan's norms under autocast on CPUs
@by_name
def test_gradients_are_those_of_autocast_and_checkpointing_too(method: Method) -> None:
    def gradients() -> list[Tensor]:
        model.zero_grad()
        parameters = [each for each in falloff.branches(model).parameters() if each.requires_grad]
        loss = model(**tiny.inputs(), return_dict=False)[0].float().square().mean()
        return list(torch.autograd.grad(loss, parameters))

    model = tiny.transformer()
    falloff.enable(model, method, schedule=tiny.ALWAYS)
    train_a_little(model)
    plain = gradients()
    model.enable_gradient_checkpointing()
    model.train()
    torch.testing.assert_close(gradients(), plain)
    under_autocast = []
    for layer in falloff.branches(model)["0"].values():
        layer.register_forward_pre_hook(lambda *_: under_autocast.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients()
    assert under_autocast
    assert not any(under_autocast)
    assert all(bool(each.isfinite().all()) for each in rough)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo looks at it while tracing
@pytest.mark.parametrize(("method", "whole"), [(METHODS[0], False), (GATED, True)])
def test_compiled_it_runs_and_refuses_to_learn(method: Method, whole: bool) -> None:
    torch._dynamo.reset()
    model = tiny.transformer()
    falloff.enable(model, method, schedule=tiny.ALWAYS)
    train_a_little(model)
    eager = forward(model)
    target = torch.compile(model, backend="eager", fullgraph=True) if whole else model
    if not whole:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(forward(target), eager, atol=1e-6, rtol=1e-6)
    with pytest.raises(MethodError, match=r"whose gradients torch\.compile does not see: train the model"):
        target(**tiny.inputs())
    falloff.branches(model).requires_grad_(False)
    target(**tiny.inputs())
    torch._dynamo.reset()


def test_dense_layers_have_none() -> None:
    model = tiny.transformer(layers=3)
    falloff.enable(model, SLA(q_block=16, kv_block=8), schedule=Schedule(dense_first=0, dense_layers=(0, 2)))
    assert list(falloff.branches(model)["0"]) == ["1"]
    falloff.enable(model, SLA(), schedule=Schedule(dense_first=0, dense_layers=(0, 1, 2)), replace=True)
    assert not list(falloff.branches(model)["0"])
    forward(model)


def test_bfloat16_models_keep_single_precision_parameters() -> None:
    model = tiny.transformer()
    falloff.enable(model, SLA(q_block=16, kv_block=8, density=0.2))
    model.to(torch.bfloat16)
    sparse = forward_bf16(model)
    train_a_little(model)
    assert {parameter.dtype for parameter in falloff.branches(model).parameters()} == {torch.float32}
    out = forward_bf16(model)
    assert out.dtype == torch.bfloat16
    assert not torch.allclose(out, sparse)


def forward_bf16(model: Any) -> Tensor:
    arguments = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tiny.inputs().items()}
    with torch.no_grad():
        out: Tensor = model(**arguments, return_dict=False)[0]
    return out


def test_plans_are_made_by_the_layers_own_router() -> None:
    model = tiny.transformer()
    falloff.enable(model, SLA2(q_block=16, kv_block=8, density=0.2))
    plans = []
    for _ in range(2):
        forward(model)
        plans.append(falloff.report(model).plan)
        for layer in falloff.branches(model)["0"].values():
            layer.router_k.weight.data.neg_()
    assert not torch.equal(plans[0].blocks.columns, plans[1].blocks.columns)


def test_parameters_follow_the_device_of_a_forward() -> None:
    trained = Trained()
    layer = trained.add(SLA(), 0, 0, Layer(heads=2, head_dim=3, width=6), torch.device("cpu"))
    trained.begin(torch.device("meta"))
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}


def test_methods_that_learn_nothing_say_so(tmp_path: Path) -> None:
    model = tiny.transformer()
    falloff.enable(model, "radial")
    for call in (falloff.branches, lambda it: falloff.save_branches(it, tmp_path / "x.safetensors")):
        with pytest.raises(BranchError, match="radial has no parameters to train"):
            call(model)


def saved(path: Path, method: Method, layers: int = 2) -> Path:
    model = tiny.transformer(layers=layers)
    falloff.enable(model, method, schedule=tiny.ALWAYS)
    train_a_little(model)
    falloff.save_branches(model, path)
    return path


@pytest.mark.parametrize(
    ("enabled", "layers", "message"),
    [
        (SLA(), 3, r"is for WanTransformer3DModel with 2 self-attention layers, this is .* with 3"),
        (SLA(features="elu"), 2, r"was trained with .*'softmax'.*, enabled is .*'elu'"),
        (SLA(linear_over="all"), 2, r"was trained with .*'marginal'.*, enabled is .*'all'"),
    ],
)
def test_files_for_others_are_refused(tmp_path: Path, enabled: Method, layers: int, message: str) -> None:
    path = saved(tmp_path / "sla.safetensors", SLA())
    model = tiny.transformer(layers=layers)
    falloff.enable(model, enabled)
    with pytest.raises(BranchError, match=message):
        falloff.load_branches(model, path)


def test_other_densities_and_blocks_are_welcome(tmp_path: Path) -> None:
    path = saved(tmp_path / "sla.safetensors", SLA())
    model = tiny.transformer()
    falloff.enable(model, SLA(density=0.15, q_block=128))
    falloff.load_branches(model, path)
    assert torch.equal(falloff.branches(model)["0"]["1"].proj.weight, load_file(path)["0.1.proj.weight"])


def test_incomplete_and_broken_files_change_nothing(tmp_path: Path) -> None:
    from safetensors import safe_open

    path = saved(tmp_path / "sla.safetensors", SLA())
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    model = tiny.transformer()
    falloff.enable(model, SLA())
    missing = {name: tensor for name, tensor in tensors.items() if name != "0.1.proj.bias"}
    save_file(missing, path, metadata=metadata)
    with pytest.raises(BranchError, match=r"lacks 1 of 4 parameters, the first of them 0\.1\.proj\.bias"):
        falloff.load_branches(model, path)
    save_file({**tensors, "0.1.proj.bias": torch.zeros(5)}, path, metadata=metadata)
    with pytest.raises(BranchError, match=r"0\.1\.proj\.bias is \[5\], this model's is \[12\]"):
        falloff.load_branches(model, path)
    save_file(tensors, path, metadata={**metadata, "falloff": "9"})
    with pytest.raises(BranchError, match="has format 9, this falloff reads 1"):
        falloff.load_branches(model, path)
    save_file(tensors, path, metadata={**metadata, "method": "other"})
    with pytest.raises(BranchError, match="is of the method 'other', enabled is 'sla'"):
        falloff.load_branches(model, path)
    path.write_bytes(b"no tensors")
    with pytest.raises(BranchError, match="is no safetensors file"):
        falloff.load_branches(model, path)
    with pytest.raises(FileNotFoundError):
        falloff.load_branches(model, tmp_path / "nowhere.safetensors")
    assert not any(parameter.any() for parameter in falloff.branches(model).parameters())


FOREIGN = {
    "turbo": "net.blocks.{}.self_attn.attn_op.local_attn.proj_l.{}",
    "fast": "blocks.{}.attn1.attn_impl.proj_l.{}",
}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("form", FOREIGN)
def test_projections_of_published_checkpoints(tmp_path: Path, form: str, ending: str) -> None:
    shapes = {"weight": (12, 12), "bias": (12,)}
    tensors = {
        FOREIGN[form].format(layer, name): torch.randn(shape, generator=torch.Generator().manual_seed(layer)).bfloat16()
        for layer in range(2)
        for name, shape in shapes.items()
    }
    everything = {**tensors, "blocks.0.self_attn.q.weight": torch.zeros(4, 4)}
    path = tmp_path / f"model.{ending}"
    if ending == "pth":
        torch.save(everything, path)
    else:
        save_file(everything, path)
    model = tiny.transformer()
    falloff.enable(model, SLA(linear_over="all"))
    falloff.load_branches(model, path)
    for layer in range(2):
        projection = falloff.branches(model)["0"][str(layer)].proj
        assert torch.equal(projection.weight, tensors[FOREIGN[form].format(layer, "weight")].float())
        assert torch.equal(projection.bias, tensors[FOREIGN[form].format(layer, "bias")].float())
    falloff.enable(model, SLA(), replace=True)
    with pytest.raises(BranchError, match=r'enable SLA\(linear_over="all"\)'):
        falloff.load_branches(model, path)


def test_files_without_any(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(4, 4)}, path)
    model = tiny.transformer()
    falloff.enable(model, SLA(linear_over="all"))
    with pytest.raises(BranchError, match="holds no trained parameters"):
        falloff.load_branches(model, path)


def test_layers_of_every_family_tell_their_shape() -> None:
    from falloff.hosts import host_for

    for name, family in FAMILIES.items():
        model = family.shallow().build()
        for path in host_for(model).attention_paths(model):
            shape, device = layer_of(path, model.get_submodule(path))
            assert shape.heads == 2, name
            assert shape.heads * shape.head_dim == shape.width, name
            assert device == torch.device("cpu")


def test_hidden_states_of_some_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.transformer()
    falloff.enable(model, GATED, schedule=tiny.ALWAYS)
    monkeypatch.setattr("falloff.hosts.parallel.shares", lambda config: (2, 0))
    with pytest.raises(UnsupportedModelError, match="vsa as it is set reads the layers' hidden states"):
        forward(model)


def test_layers_that_do_not_tell_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"a\.b is a Linear that does not tell its heads and channels"):
        layer_of("a.b", nn.Linear(2, 2))
