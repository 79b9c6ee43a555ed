import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from falloff.cli.settings import choose, choose_all, words
from falloff.kernels import proof
from falloff.kernels.vendor import flex

SPARSE = ("--set", "block=2", "--set", "dense_first=1", "--set", "sink_frames=0")


def test_generate(falloff, checkpoint: Path, tmp_path: Path) -> None:
    from falloff.evaluation.video import read

    output = tmp_path / "new" / "fox.mp4"
    result = falloff("generate", "a fox", "--model", checkpoint, "--frames", 9, *SPARSE, "--output", output)
    assert result.code == 0
    assert read(output).shape == (9, 32, 32, 3)
    assert list(output.parent.iterdir()) == [output]
    assert "dense because     dense first step: 4 calls" in result.out
    assert "9 frames of 32 x 32 at 8 a second" in result.out
    assert "step 3 of 3" in result.err
    assert "Warning" not in result.err
    assert "it/s" not in result.err


def test_a_kernel_that_cannot_run_the_models_type_is_one_line(
    falloff, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    output, kernel = tmp_path / "new" / "fox.mp4", ("--kernel", "cpu-tile")
    result = falloff("generate", "a fox", "--model", checkpoint, "--frames", 9, *SPARSE, *kernel, "--output", output)
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("falloff: falloff tried the sparse attention of later steps")
    assert "it computes in bfloat16, the tensors are torch.float32" in result.err.splitlines()[-1]
    assert "Traceback" not in result.err
    assert not output.exists()


def test_generate_with_another_family(falloff, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from families import FAMILIES
    from worded import pipeline

    words = pipeline()
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    transformer = CogVideoXTransformer3DModel(**{**FAMILIES["CogVideoX"].config, "text_embed_dim": 16})
    pipe = CogVideoXPipeline(
        tokenizer=words.tokenizer,
        text_encoder=words.text_encoder,
        vae=vae,
        transformer=transformer,
        scheduler=CogVideoXDDIMScheduler(),
    )
    pipe.save_pretrained(tmp_path / "model")
    size = ["--frames", 9, "--height", 48, "--width", 64, "--steps", 2]
    output = tmp_path / "fox.mp4"
    result = falloff("generate", "a fox", "--model", tmp_path / "model", *size, *SPARSE, "--output", output)
    assert result.code == 0
    assert "9 frames of 64 x 48" in result.out
    assert "dense first step: 2 calls" in result.out
    assert "2 sparse, 2 dense" in result.out


def test_compare(falloff, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["--prompt", "a fox", "--model", checkpoint, "--methods", "radial,dense", "--output", tmp_path / "out"]
    result = falloff("compare", *arguments, *SPARSE)
    assert result.code == 0
    names = ["01-dense-method.mp4", "01-dense.mp4", "01-radial.mp4", "compare.html", "compare.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert "speed-up" in result.out
    assert "was measured" in result.out
    assert "compare.html" in result.out
    values = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert values["methods"][0]["schedule"]["dense_first"] == 1
    assert values["fps"] == 8


@pytest.mark.parametrize("layers", [2, 3])
def test_recipe(falloff, checkpoint: Path, tmp_path: Path, layers: int) -> None:
    from falloff import Radial, Recipe, Schedule

    schedule = Schedule(dense_first=2, dense_layers=())
    recipe = Recipe(model="WanTransformer3DModel", layers=layers, method=Radial(block=2), schedule=schedule)
    recipe.save(tmp_path / "r.yaml")
    generated = falloff(
        "generate", "a fox", "--model", checkpoint, "--method", tmp_path / "r.yaml", "--output", tmp_path / "a.mp4"
    )
    methods = f"radial(block=4),{tmp_path / 'r.yaml'}"
    out = tmp_path / "out"
    compared = falloff("compare", "--prompt", "a fox", "--model", checkpoint, "--methods", methods, "--output", out)
    if layers == 3:
        for result in (generated, compared):
            assert result.code == 1
            assert "with 3 self-attention layers, this is WanTransformer3DModel with 2" in result.err
        return
    assert "dense first step: 8 calls" in generated.out
    values = json.loads((out / "compare.json").read_text())
    assert [method["label"] for method in values["methods"]] == ["radial block=4", "radial block=2"]
    assert [method["schedule"]["dense_first"] for method in values["methods"]] == [0.25, 2]


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_interrupt(falloff, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusers.WanPipeline.decode_latents", interrupt, raising=False)
    monkeypatch.setattr("diffusers.AutoencoderKLWan.decode", interrupt)
    monkeypatch.chdir(tmp_path)
    prompt = ["a fox"] if command == "generate" else ["--prompt", "a fox"]
    result = falloff(command, *prompt, "--model", checkpoint)
    assert result.code == 130
    assert result.err.splitlines()[-1] == "falloff: interrupted"
    assert list(tmp_path.iterdir()) == []


def test_what_the_pipeline_refuses_is_one_line(falloff, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in checkpoint.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "generation.json").unlink()
    (copy / "generation.json").write_text(json.dumps({"num_frame": 5}))
    result = falloff("generate", "a fox", "--model", copy, "--output", tmp_path / "out.mp4")
    assert result.code == 1
    assert "takes no argument 'num_frame'" in result.err.splitlines()[-1]
    assert not (tmp_path / "out.mp4").exists()


def test_broken_weights(falloff, checkpoint: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    copy.mkdir()
    for path in checkpoint.iterdir():
        if path.name != "vae":
            (copy / path.name).symlink_to(path)
    (copy / "vae").mkdir()
    (copy / "vae" / "config.json").write_text((checkpoint / "vae" / "config.json").read_text())
    (copy / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    result = falloff("generate", "a fox", "--model", copy, "--output", tmp_path / "out.mp4")
    assert result.code == 1
    assert result.err.splitlines()[-1].startswith("falloff: cannot load")
    assert not (tmp_path / "out.mp4").exists()


def test_doctor(falloff) -> None:
    result = falloff("doctor")
    assert result.code == 0
    assert "torch" in result.out
    assert "reference" in result.out
    assert "trying kernels of others" in result.err
    found = json.loads(falloff("doctor", "--json").out)
    kernels = {kernel["name"]: kernel for kernel in found["kernels"]}
    assert kernels.keys() >= {"reference", "flex", "cudnn", "flash4", "flashinfer", "sparge"}
    assert all(kernel["why"] for kernel in kernels.values())
    assert kernels["flex"]["can_run"] == (flex.absent() is None and proof.verdict(flex.KERNEL, flex.trial()) is None)


def test_methods(falloff) -> None:
    result = falloff("methods")
    assert result.code == 0
    assert "radial: Radial Attention (arXiv:2506.19852)" in result.out
    assert "decay=0.2" in result.out
    detail = falloff("methods", "radial").out
    assert "dense_first=0.25" in detail
    assert "radial/wan2.1-14b" in detail
    assert falloff("methods", "dense").code == 0


def test_version_and_help(falloff) -> None:
    assert falloff("--version").out.startswith("falloff ")
    assert "generate" in falloff("--help").out
    assert falloff("generate", "--help").code == 0


def test_command_line_imports_nothing_heavy_of_its_own() -> None:
    code = "import falloff, sys; before = set(sys.modules); import falloff.cli; print(set(sys.modules) - before)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"diffusers", "transformers", "av", "PIL", "falloff.evaluation"} & set(eval(run.stdout))


def test_settings_of_method_and_schedule() -> None:
    chosen = choose("radial", ["decay=0.5", "block=auto", "dense_layers=0,2", "dense_first=0.5", "dense_last=1"])
    assert chosen.method.settings()["decay"] == 0.5
    assert chosen.method.settings()["block"] == "auto"
    assert chosen.schedule.dense_layers == (0, 2)
    assert (chosen.schedule.dense_first, chosen.schedule.dense_last) == (0.5, 1)
    assert choose("radial", ["block=64", "dense_layers="]).schedule.dense_layers == ()
    assert choose("xattention", ["tau=0.9,0.8"]).method.settings()["tau"] == (0.9, 0.8)
    assert choose("sta", ["tile=6,8,8", "window=3,1,3"]).method.settings() == {"tile": (6, 8, 8), "window": (3, 1, 3)}


def test_settings_go_to_the_methods_that_have_them() -> None:
    radial, dense = choose_all(["radial", "dense"], ["decay=0.5", "dense_first=3"])
    assert radial.method.settings()["decay"] == 0.5
    assert dense.method.settings() == {}
    assert radial.schedule.dense_first == dense.schedule.dense_first == 3


def test_types_in_words() -> None:
    assert words(int | float) == "a whole number or a number"
    assert words(tuple[int, ...]) == "whole numbers with commas between"
    assert words(tuple[float, ...]) == "numbers with commas between"
