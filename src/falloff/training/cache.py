"""Latents and text of every clip, computed once and kept as safetensors.

A file's name is a hash of all that its content depends on (the clip's file and caption, the size, the weights of
autoencoder and text encoder, the arguments that bear on text), so that what is there can be trusted, and what has
changed is made anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from falloff.evaluation import files
from falloff.training.data import Clip, Fault, read_frames, refuse, words
from falloff.training.family import Family, Sample

FORMAT = 1
"""Raised when the content of a file changes its meaning."""
TEXT, IMAGE = "text.", "image."
ABOUT_TEXT = ("clean_caption", "image_embed_interleave", "text_encoder_out_layers")
"""Call arguments of some families that bear on text, besides its length."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the videos trained on, in frames and pixels."""

    frames: int
    height: int
    width: int


@dataclass(frozen=True)
class Cache:
    """Files of the clips, in their order, and the file of the empty caption; how many latent frames are given."""

    clips: tuple[Path, ...]
    empty: Path
    given: int = 0

    def sample(self, index: int, device: torch.device, *, captioned: bool = True) -> Sample:
        """A clip, with its own caption or none, on a device."""
        content = _read(self.clips[index])
        text = _named(TEXT, content if captioned else _read(self.empty))
        frames, height, width = content["size"].tolist()
        return Sample(
            content["latents"].to(device),
            (frames, height, width),
            {name: x.to(device) for name, x in text.items()},
            {name: x.to(device) for name, x in _named(IMAGE, content).items()},
            self.given,
        )

    def identity(self) -> str:
        """Changes with any of the clips, their captions, or what encoded them."""
        return _hash([file.name for file in (*self.clips, self.empty)])


def prepare(
    pipe: Any,
    family: Family,
    clips: Sequence[Clip],
    size: Size,
    call: Mapping[str, Any],
    folder: Path,
    *,
    share: slice = slice(None),
    on_clip: Callable[[int, int], None] = lambda done, total: None,
) -> Cache:
    """Encode what is not in ``folder`` yet. ``share``: the clips that are this process's to encode.

    Raises ``TrainingError`` that lists every clip whose pictures cannot be decoded, when all others are done.
    """
    cache = _places(pipe, family, clips, size, call, folder)
    if not _whole(cache.empty):
        _write(cache.empty, _prefixed(TEXT, family.text(pipe, "", call)))
    faults: list[Fault] = []
    mine = list(zip(clips, cache.clips, strict=True))[share]
    for done, (clip, file) in enumerate(mine, 1):
        if not _whole(file):
            try:
                video = read_frames(clip, size.frames, size.height, size.width)
            except (OSError, ValueError) as error:
                faults.append((clip.name, f"cannot be decoded: {words(error)}"))
                continue
            _write(file, _encoded(pipe, family, video, clip.caption, call))
        on_clip(done, len(mine))
    refuse(faults, len(clips))
    return cache


def _places(
    pipe: Any, family: Family, clips: Sequence[Clip], size: Size, call: Mapping[str, Any], folder: Path
) -> Cache:
    given = family.given(pipe)
    encoders = [fingerprint(part) for _, part in sorted(pipe.components.items()) if _encodes(part)]
    asked = [[name, call[name]] for name in ABOUT_TEXT if name in call]
    common = [FORMAT, type(pipe).__name__, encoders, call.get("max_sequence_length"), *[given][:given], *asked]
    shape = [size.frames, size.height, size.width]
    named = [folder / f"{_hash([*common, shape, clip.stamp()])}.safetensors" for clip in clips]
    return Cache(tuple(named), folder / f"{_hash([*common, 'empty'])}.safetensors", given)


def _encodes(part: Any) -> bool:
    return isinstance(part, nn.Module) and "Transformer" not in type(part).__name__


def fingerprint(model: nn.Module) -> list[str]:
    """Of a model's class, sizes and some of its weights."""
    named = list(model.named_parameters())
    shapes = _hash([[name, list(parameter.shape)] for name, parameter in named])
    ends = [
        parameter.detach().flatten()[:1024].float().cpu().numpy().tobytes()
        for _, parameter in named[:: len(named) - 1 or 1]
    ]
    return [type(model).__name__, shapes, *(hashlib.sha256(end).hexdigest() for end in ends)]


@torch.no_grad()
def _encoded(pipe: Any, family: Family, video: Tensor, caption: str, call: Mapping[str, Any]) -> dict[str, Tensor]:
    vae = pipe.vae
    latents = family.encode(vae, video.to(vae.device, vae.dtype))
    image = {}
    if family.image is not None:
        call = {**call, "image": picture(video)}
        image = family.image(pipe, call["image"], call)
    return {
        "latents": family.latents(pipe, latents),
        "size": torch.tensor(latents.shape[2:]),
        **_prefixed(TEXT, family.text(pipe, caption, call)),
        **_prefixed(IMAGE, image),
    }


def picture(video_1CFHW: Tensor) -> Image.Image:
    """The first frame of a video in -1 to 1."""
    pixels = ((video_1CFHW[0, :, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: x for name, x in tensors.items()}


def _named(prefix: str, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in content.items() if name.startswith(prefix)}


def _write(file: Path, content: dict[str, Tensor]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    files.write(file, save({name: x.detach().cpu().contiguous() for name, x in content.items()}))


def _read(file: Path) -> dict[str, Tensor]:
    content: dict[str, Tensor] = load(file.read_bytes())
    return content


def _whole(file: Path) -> bool:
    """Whether a file is there and can be read, which one cut short by a full disk cannot."""
    try:
        _read(file)
    except (OSError, SafetensorError):
        return False
    return True


def _hash(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
