"""A model on this GPU, compiled with CUDA graphs: its attention leads to the session at every step."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MODES = ["default", "reduce-overhead"]


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_a_compiled_model_computes_what_it_does_in_eager_mode(mode: str) -> None:
    pytest.importorskip("diffusers")
    import tiny

    import falloff

    model = tiny.transformer().to("cuda")
    inputs = {name: x.to("cuda") for name, x in tiny.inputs().items()}
    falloff.enable(model, tiny.Frames())
    steps = [inputs | {"timestep": torch.tensor([timestep], device="cuda")} for timestep in (900, 700, 500, 300)]
    expected = [model(**step, return_dict=False)[0].clone() for step in steps]
    assert {call.kernel for call in falloff.report(model).calls} == {"triton"}
    falloff.enable(model, tiny.Frames(), replace=True)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for step, want in zip(steps, expected, strict=True):  # graphs are recorded on the way
        torch.testing.assert_close(compiled(**step, return_dict=False)[0].clone(), want, atol=1e-4, rtol=1e-4)
    calls = falloff.report(model).calls
    assert [call.step for call in calls if call.layer == 0] == [0, 1, 2, 3]
    assert {call.kernel for call in calls} == {"triton"}
