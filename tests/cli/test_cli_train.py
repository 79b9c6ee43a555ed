"""``falloff train lora`` and ``sparse`` on a tiny checkpoint, and what is made with their output."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "training"))

METHOD = ("--method", "radial", "--set", "block=4", "--set", "dense_layers=0")
COMMON = ("--frames", 5, "--rank", 4, "--steps", 2, "--validation", 1, "--check-every", 2, "--rate", 0.05)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_clips import write_clip

    folder = tmp_path_factory.mktemp("clips")
    for number in range(3):
        write_clip(folder / f"{number}.mp4", frames=5, shade=40 * number)
        (folder / f"{number}.txt").write_text("a fox")
    return folder


@pytest.fixture(scope="module")
def lora(checkpoint: Path, clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from falloff.cli import run

    output = tmp_path_factory.mktemp("trained") / "lora"
    arguments = ("train", "lora", clips, "--model", checkpoint, *METHOD, *COMMON, "--output", output)
    assert run([str(argument) for argument in arguments]) == 0
    return output


def test_a_lora_is_trained_and_gone_on_with(falloff, checkpoint: Path, clips: Path, lora: Path) -> None:
    longer = [*COMMON, "--steps", 3]
    done = falloff("train", "lora", clips, "--model", checkpoint, *METHOD, *longer, "--output", lora)
    assert done.code == 0, done.err
    assert f"--lora {lora} --method {lora / 'recipe.yaml'} --frames 5" in " ".join(done.out.split())
    for line in ("looking at clips, 1 of 3", "validating, 1 of 5", "training, 3 of 3, loss 1."):
        assert line in done.err
    steps = [json.loads(line)["step"] for line in (lora / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2, 3, 3]
    assert (lora / "samples" / "step-000003-0.mp4").stat().st_size > 100


def test_generate_and_compare_take_the_lora(falloff, checkpoint: Path, lora: Path, tmp_path: Path) -> None:
    from falloff.evaluation import video

    recipe = lora / "recipe.yaml"
    for name, more in (("without", ()), ("with", ("--lora", lora))):
        done = falloff(
            "generate", "a fox", "--model", checkpoint, "--method", recipe, *more, "--output", tmp_path / f"{name}.mp4"
        )
        assert done.code == 0, done.err
    assert (video.read(tmp_path / "with.mp4") != video.read(tmp_path / "without.mp4")).any()
    done = falloff(
        "compare",
        "--prompt",
        "a fox",
        "--model",
        checkpoint,
        "--methods",
        recipe,
        "--lora",
        lora,
        "--output",
        tmp_path / "page",
    )
    assert done.code == 0, done.err


@pytest.mark.slow
def test_both_experts_are_trained_and_used(falloff, clips: Path, tmp_path: Path) -> None:
    """On two processes as one, and by every command that takes the LoRA."""
    from falloff.evaluation import video

    model, lora = tmp_path / "model", tmp_path / "lora"
    saved("experts", model)
    command = ["train", "lora", clips, "--model", model, *METHOD, *COMMON, "--batch", 2, "--output", lora]
    done = on_two_processes([str(part) for part in command])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote") == 1
    assert {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"} <= {
        file.name for file in lora.iterdir()
    }
    steps = [json.loads(line)["step"] for line in (lora / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 2]
    common, videos = ("--model", model, "--frames", 5), []
    for more in ((), ("--lora", lora / "pytorch_lora_weights.safetensors"), ("--lora", lora)):
        target = tmp_path / f"{len(videos)}.mp4"
        done = falloff("generate", "a fox", *common, "--method", lora / "recipe.yaml", *more, "--output", target)
        assert done.code == 0, done.err
        videos.append(video.read(target))
    assert all((videos[i] != videos[j]).any() for i, j in ((0, 1), (1, 2), (0, 2)))
    page = ("--lora", lora, "--methods", lora / "recipe.yaml", "--output", tmp_path / "page")
    done = falloff("compare", "--prompt", "a fox", *common, *page)
    assert done.code == 0, done.err


def on_two_processes(command: list[str]) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from falloff.cli import run; sys.exit(run({command!r}))"
    source = str(Path(__file__).parents[2] / "src")
    own = {"PYTHONPATH": source, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    return subprocess.run(
        [*launch, sys.executable, "-c", code], env={**os.environ, **own}, capture_output=True, text=True, check=False
    )


def saved(kind: str, folder: Path) -> None:
    """A checkpoint of ``worded_pipes``."""
    import worded_pipes
    from worded import SIZE

    made = worded_pipes.experts() if kind == "experts" else worded_pipes.image_to_video(kind)
    made.save_pretrained(folder)
    (folder / "generation.json").write_text(json.dumps({**SIZE, "fps": 8}))


def test_image_to_video_is_trained_and_told_how_to_be_used(falloff, clips: Path, tmp_path: Path) -> None:
    saved("2.2 5B", tmp_path / "model")
    done = falloff(
        *("train", "lora", clips, "--model", tmp_path / "model", *METHOD, *COMMON, "--output", tmp_path / "lora")
    )
    assert done.code == 0, done.err
    lora = tmp_path / "lora"
    told = f"falloff generate PROMPT --image FILE --lora {lora} --method {lora / 'recipe.yaml'} --frames 5"
    assert told in " ".join(done.out.split())
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    way = ("--image", tmp_path / "red.png", "--lora", lora, "--method", lora / "recipe.yaml", "--frames", 5)
    done = falloff("generate", "a fox", "--model", tmp_path / "model", *way, "--output", tmp_path / "fox.mp4")
    assert done.code == 0, done.err


def test_a_model_tells_its_size_where_the_pipeline_does_not(falloff, clips: Path, tmp_path: Path) -> None:
    from tiny_cogvideox import cogvideox

    cogvideox().save_pretrained(tmp_path / "model")
    steps = ("--inference-steps", 2, "--samples", 0)
    done = falloff(
        *("train", "lora", clips, "--model", tmp_path / "model", *METHOD, *COMMON, *steps, "--output", tmp_path / "out")
    )
    assert done.code == 0, done.err
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    for told in ("frames: 5", "height: 32", "width: 32", "trained_grid_frames: 3"):
        assert told in recipe


@pytest.mark.filterwarnings("ignore:__array__ implementation")  # between a scheduler of diffusers and numpy
def test_a_model_whose_autoencoder_works_in_tiles(falloff, tmp_path: Path) -> None:
    from further_pipes import allegro
    from tiny_clips import write_clip

    allegro().save_pretrained(tmp_path / "model")
    (tmp_path / "clips").mkdir()
    for number in range(2):
        write_clip(tmp_path / "clips" / f"{number}.mp4", frames=24)
        (tmp_path / "clips" / f"{number}.txt").write_text("a fox")
    model = ("--model", tmp_path / "model")
    train = ("train", "lora", tmp_path / "clips", *model, *METHOD, "--rank", 4, "--steps", 1, "--validation", 1)
    lora, steps = ("--output", tmp_path / "lora"), ("--inference-steps", 2, "--samples", 0)
    done = falloff(*train, *steps, *lora)
    assert done.code == 0, done.err
    assert "frames: 24" in (tmp_path / "lora" / "recipe.yaml").read_text()
    way = ("--lora", tmp_path / "lora", "--method", tmp_path / "lora" / "recipe.yaml", "--steps", 1)
    done = falloff("generate", "a fox", *model, *way, "--output", tmp_path / "fox.mp4")
    assert done.code == 0, done.err
    done = falloff(*train, *steps, "--frames", 28, "--output", tmp_path / "other")
    assert done.code == 1, done.out
    assert "do not cover num_frames = 28; the nearest are 24 and 40" in done.err


def test_a_model_of_pictures_is_trained_on_pictures(falloff, tmp_path: Path) -> None:
    from further_pipes import flux

    flux().save_pretrained(tmp_path / "model")
    (tmp_path / "pictures").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 48), (90 * number, 90, 30)).save(tmp_path / "pictures" / f"{number}.jpg")
        (tmp_path / "pictures" / f"{number}.txt").write_text("a fox")
    model, small = ("--model", tmp_path / "model"), ("--height", 64, "--width", 64)
    train = (
        "train",
        "lora",
        tmp_path / "pictures",
        *model,
        "--method",
        "sparge",
        "--set",
        "q_block=4",
        "--rank",
        4,
    )
    course = ("--steps", 1, "--validation", 1, "--samples", 1, "--inference-steps", 2)
    done = falloff(*train, *course, *small, "--output", tmp_path / "lora")
    assert done.code == 0, done.err
    told = " ".join(done.out.split())
    assert f"--method {tmp_path / 'lora' / 'recipe.yaml'} --height 64 --width 64 --model" in told
    assert "frames: 1" in (tmp_path / "lora" / "recipe.yaml").read_text()
    with Image.open(tmp_path / "lora" / "samples" / "step-000001-0.png") as sample:
        assert sample.size == (64, 64)
    way = ("--lora", tmp_path / "lora", "--method", tmp_path / "lora" / "recipe.yaml", "--steps", 1)
    done = falloff("generate", "a fox", *model, *small, *way, "--output", tmp_path / "fox.png")
    assert done.code == 0, done.err
    assert "fox.png: 64 x 64" in " ".join(done.out.split())
    with Image.open(tmp_path / "fox.png") as drawn:
        assert drawn.size == (64, 64)


def test_sizes_that_pipelines_do_not_tell() -> None:
    from further_pipes import flux, hunyuan_video15

    from falloff.cli.errors import CommandError
    from falloff.cli.train_options import size_of, usual_size

    pipe = hunyuan_video15()
    assert usual_size(pipe, {}) == {"frames": 121, "height": 0, "width": 0}
    assert size_of(pipe, {"height": 480, "width": 832}) == {"frames": 121, "height": 480, "width": 832}
    with pytest.raises(CommandError, match="HunyuanVideo15Pipeline has no size of its own; give --width"):
        size_of(pipe, {"height": 480})
    assert size_of(flux(), {"height": 512}) == {"frames": 1, "height": 512, "width": 1024}


def test_branches_are_trained(falloff, checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    done = falloff(
        *("train", "sparse", clips, "--model", checkpoint, "--set", "density=0.5", "--set", "q_block=4"),
        *("--set", "kv_block=4", *COMMON, "--ramp", 1, "--output", tmp_path / "sla"),
    )
    assert done.code == 0, done.err
    assert {"branches.safetensors", "pytorch_lora_weights.safetensors", "recipe.yaml"} <= {
        file.name for file in (tmp_path / "sla").iterdir()
    }
    recipe, lora = tmp_path / "sla" / "recipe.yaml", ("--model", checkpoint, "--lora", tmp_path / "sla")
    blank = tmp_path / "blank.yaml"
    blank.write_text(recipe.read_text().replace("branches: branches.safetensors\n", ""))
    for way in (recipe, blank):
        video = tmp_path / f"{way.stem}.mp4"
        done = falloff("generate", "a fox", *lora, "--method", way, "--frames", 5, "--output", video)
        assert done.code == 0, done.err
    assert (tmp_path / "recipe.mp4").read_bytes() != (tmp_path / "blank.mp4").read_bytes()
    arguments = ("--methods", recipe, "--frames", 5, "--output", tmp_path / "page")
    done = falloff("compare", "--prompt", "a fox", *lora, *arguments)
    assert done.code == 0, done.err


def test_a_first_stage_is_a_start_for_the_second(falloff, checkpoint: Path, clips: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    common = ("train", "sparse", clips, "--model", checkpoint, *COMMON, "--cache", tmp_path / "cache")
    settings = ("--set", "density=0.5", "--set", "q_block=4", "--set", "kv_block=4")
    done = falloff(*common, *settings, "--aim", "output", "--output", first)
    assert done.code == 1
    assert "backbone = 'lora' would change the model meanwhile; set backbone = 'none'" in done.err
    done = falloff(*common, *settings, "--aim", "output", "--backbone", "none", "--output", first)
    assert done.code == 0, done.err
    recipe = first / "recipe.yaml"
    assert f"falloff train sparse {clips} --method {recipe} --start {first}" in " ".join(done.out.split())
    done = falloff("generate", "a fox", "--model", checkpoint, "--lora", first, "--method", recipe, "--frames", 5)
    assert done.code == 1
    assert f"what {first} holds was trained without one" in done.err
    done = falloff(*common, "--method", recipe, "--start", first, "--output", second)
    assert done.code == 0, done.err
    assert f"--lora {second} --method {second / 'recipe.yaml'} --frames 5" in " ".join(done.out.split())
    done = falloff(*common, "--method", "sla2", "--start", first, "--output", tmp_path / "third")
    assert done.code == 1
    assert f"cannot start as asked: {first / 'branches.safetensors'} is of the method 'sla'" in done.err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--frames", 6), "--frames 6 is not 1 more than a multiple of 4"),
        (
            ("--frames", 9),
            "3 files cannot be trained on (remove or replace them): 0.mp4: has 5 frames, fewer than the 9",
        ),
        (("--frames", 5, "--rope", "yarn"), "rope = 'yarn' must be one of plain, riflex"),
        (("--frames", 5, "--validation", 3), "3 clips are to be kept for validation, and there are 3 in all"),
        (("--frames", 5, "--method", "sla"), "sla has parameters of its own to train"),
    ],
)
def test_what_does_not_fit_is_told_before_any_training(
    falloff, checkpoint: Path, clips: Path, tmp_path: Path, arguments: tuple[object, ...], told: str
) -> None:
    done = falloff("train", "lora", clips, "--model", checkpoint, *arguments, "--output", tmp_path / "out")
    assert done.code != 0
    assert told in done.err
    assert not (tmp_path / "out").exists()


def test_a_training_places_the_models_itself(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes would meet on the first GPU otherwise, each with all of the pipeline."""
    from diffusers import DiffusionPipeline

    from falloff.cli import train_options

    moved = []
    monkeypatch.setattr(DiffusionPipeline, "to", lambda pipe, device: moved.append(device))
    with train_options.bench(str(checkpoint), "radial", [], 5, 32, 32, 2, "auto", tmp_path) as bench:
        assert bench.pipe.transformer is not None
    assert not moved


def test_no_lora_is_told(falloff, checkpoint: Path, tmp_path: Path) -> None:
    done = falloff("generate", "a fox", "--model", checkpoint, "--lora", tmp_path, "--output", tmp_path / "a.mp4")
    assert done.code == 1
    assert "there is no LoRA at" in done.err
    assert not (tmp_path / "a.mp4").exists()
