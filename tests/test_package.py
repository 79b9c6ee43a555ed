"""What the package offers at its door."""

import subprocess
import sys

import pytest
import torch

import falloff
from falloff.methods import Call, Dense, Method, State


def test_every_public_name_exists() -> None:
    for name in falloff.__all__:
        assert getattr(falloff, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'radial'"):
        _ = falloff.radial


def test_import_loads_no_pipeline_library() -> None:
    heavy = "{'diffusers', 'transformers', 'accelerate', 'peft', 'av', 'sklearn', 'rich', 'typer'}"
    code = f"import sys, falloff; print(sorted({heavy} & set(sys.modules)))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "[]"


def test_plan_for_runs_through_attention() -> None:
    sequence = falloff.Sequence(falloff.Grid(4, 5, 7), text=3)
    plan = falloff.plan_for(falloff.Radial(block=8), sequence)
    q, k, v = torch.randn(3, 1, 2, sequence.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask())
    torch.testing.assert_close(falloff.attention(q, k, v, plan), expected, rtol=1e-5, atol=1e-5)


def test_plan_for_refuses_methods_without_a_plan() -> None:
    class Looking(Method):
        name = "looking"

        def plan(self, call: Call, q_BHND: object, k_BHND: object, v_BHND: object, state: State) -> Dense:
            return Dense("never asked")

    sequence = falloff.Sequence(falloff.Grid(1, 1, 8))
    with pytest.raises(ValueError, match="looking plans from queries and keys"):
        falloff.plan_for(Looking(), sequence)
    with pytest.raises(ValueError, match=r"dense has no plan for .*: method keeps attention dense"):
        falloff.plan_for(falloff.Full(), sequence)


def test_presets_can_be_enabled_as_documented() -> None:
    preset = falloff.preset("radial/wan2.1-14b")
    assert preset.method.name == "radial"
    assert preset.schedule.dense_first == 0.24
