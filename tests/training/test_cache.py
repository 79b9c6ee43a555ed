"""Latents and text are computed once, and again when anything they depend on has changed."""

from pathlib import Path

import pytest
import torch
from tiny_clips import write_clip

from falloff.training import Size, TrainingError
from falloff.training.cache import prepare
from falloff.training.data import read_frames, usable
from falloff.training.families import family_of

CPU = torch.device("cpu")
SIZE = Size(frames=9, height=32, width=32)
CALL = {"max_sequence_length": 8}


def test_a_sample_is_what_the_pipeline_encodes(pipe, clips: Path, tmp_path: Path) -> None:
    found = usable(clips, 9)
    cache = prepare(pipe, family_of(pipe), found, SIZE, CALL, tmp_path)
    sample, bare = cache.sample(1, CPU), cache.sample(1, CPU, captioned=False)
    assert sample.latents.shape == (1, 16, 3, 4, 4)
    assert sample.size == (3, 4, 4)
    expected = pipe.encode_prompt("a fox", do_classifier_free_guidance=False, max_sequence_length=8)[0]
    torch.testing.assert_close(sample.text["encoder_hidden_states"], expected)
    assert not torch.allclose(bare.text["encoder_hidden_states"], expected, atol=1e-3)
    config = pipe.vae.config
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std))
    raw = pipe.vae.encode(read_frames(found[1], 9, 32, 32)).latent_dist.mode()
    torch.testing.assert_close(sample.latents * std + mean, raw)  # so the pipeline undoes it before it decodes


def test_what_is_there_is_not_made_again(pipe, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, family = usable(clips, 9), family_of(pipe)
    first = prepare(pipe, family, found, SIZE, CALL, tmp_path)
    first.clips[2].write_bytes(first.clips[2].read_bytes()[:100])  # as a full disk leaves it
    made = []
    encode = pipe.vae.encode
    monkeypatch.setattr(pipe.vae, "encode", lambda video: (made.append(1), encode(video))[1])
    again = prepare(pipe, family, found, SIZE, CALL, tmp_path)
    assert len(made) == 1
    assert again.identity() == first.identity()


@pytest.mark.parametrize("change", ["caption", "size", "weights", "text", "layers"])
def test_a_change_makes_new_files(pipe, clips: Path, tmp_path: Path, change: str) -> None:
    from dataclasses import replace

    found, family, size, call = usable(clips, 9), family_of(pipe), SIZE, dict(CALL)
    before = prepare(pipe, family, found[:1], size, call, tmp_path)
    if change == "caption":
        found[0] = replace(found[0], caption="a fox a fox")
    elif change == "size":
        size = replace(SIZE, frames=5)
    elif change == "weights":
        next(pipe.vae.parameters()).data += 1
    elif change == "text":
        call["max_sequence_length"] = 4
    else:
        call["text_encoder_out_layers"] = (1, 2)  # which Wan's takes no notice of
    after = prepare(pipe, family, found[:1], size, call, tmp_path)
    assert before.clips != after.clips
    assert before.identity() != after.identity()


def test_pictures_that_cannot_be_decoded_are_told_together(pipe, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_clip(tmp_path / f"{name}.mp4", frames=9)
        (tmp_path / f"{name}.txt").write_text("a")
    found = usable(tmp_path, 9)
    for name in ("a", "c"):
        (tmp_path / f"{name}.mp4").write_bytes(b"gone bad since")
    with pytest.raises(TrainingError, match=r"2 files .* a\.mp4: cannot be decoded.*c\.mp4: cannot be decoded"):
        prepare(pipe, family_of(pipe), found, SIZE, CALL, tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2  # the empty caption, and the good clip
