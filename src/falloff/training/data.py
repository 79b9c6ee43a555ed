"""Videos with captions from plain files, or pictures: found, looked over, and read.

A folder itself, not those in it, holds videos each with a .txt of the same stem beside it; or one .jsonl whose lines
are ``{"file": ..., "caption": ...}``; or .tar shards as WebDataset names their members: what a name has before its
first dot belongs together, so that ``0001.mp4`` goes with ``0001.txt``. Where a single frame is trained on, pictures
are as good as videos.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn.functional import interpolate

from falloff.training.errors import TrainingError

VIDEOS = (".mp4", ".mov", ".mkv", ".webm")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
BROKEN = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises for files that are no picture; one too large to be safe has an error of its own."""
Fault = tuple[str, str]
"""A file's name, and what is wrong with it."""
FORMS = "videos (or pictures, for one frame) with a .txt beside each, one .jsonl with file and caption, or .tar shards"


@dataclass(frozen=True)
class Clip:
    """A video or picture file, or a member of a .tar shard, and what it shows. ``name``: for people."""

    name: str
    caption: str
    file: Path
    member: str | None = None

    @property
    def pictured(self) -> bool:
        """Whether it is a picture, by its name."""
        return (self.member or self.file.name).lower().endswith(PICTURES)

    def content(self) -> bytes:
        if self.member is None:
            return self.file.read_bytes()
        with tarfile.open(self.file) as shard:
            return _member(shard, self.member)

    def stamp(self) -> str:
        """Changes when the file, its place or the caption does."""
        state = self.file.stat()
        return f"{self.file.resolve()}:{self.member}:{state.st_size}:{state.st_mtime_ns}:{self.caption}"


def usable(folder: Path, frames: int, on_clip: Callable[[int, int], None] = lambda done, total: None) -> list[Clip]:
    """The clips of a folder, in the order of their names; ``on_clip`` is told how many have been looked at.

    Raises ``TrainingError`` that lists every file which has no caption, cannot be read or is shorter than ``frames``,
    and for a folder with nothing usable.
    """
    clips, faults = find(folder, (*VIDEOS, *PICTURES) if frames == 1 else VIDEOS)
    if not clips and not faults:
        raise TrainingError(f"{folder} holds nothing to train on; it takes {FORMS}")
    for done, clip in enumerate(clips, 1):
        if (fault := _fault(clip, frames)) is not None:
            faults.append((clip.name, fault))
        on_clip(done, len(clips))
    refuse(faults, len(clips))
    return clips


def refuse(faults: Sequence[Fault], total: int) -> None:
    """Raise ``TrainingError`` when there are faults, with all of them."""
    if faults:
        listed = "; ".join(f"{name}: {fault}" for name, fault in sorted(faults))
        raise TrainingError(f"{len(faults)} files cannot be trained on (remove or replace them): {listed}")


def words(error: Exception) -> str:
    """An error without the number that PyAV gives it."""
    return getattr(error, "strerror", None) or str(error)


def find(folder: Path, kinds: tuple[str, ...] = VIDEOS) -> tuple[list[Clip], list[Fault]]:
    """All clips of a folder whose names end in ``kinds``, or that a list tells, and the files that are none.

    Raises ``TrainingError`` for what is no folder.
    """
    if not folder.is_dir():
        raise TrainingError(f"there is no folder {folder}; give one with {FORMS}")
    lists, shards = sorted(folder.glob("*.jsonl")), sorted(folder.glob("*.tar"))
    if len(lists) > 1:
        raise TrainingError(f"{folder} holds {len(lists)} .jsonl files; keep the one that lists the videos")
    if lists:
        return _listed(lists[0])
    if shards:
        found = [_in_shard(shard, kinds) for shard in shards]
        return [clip for clips, _ in found for clip in clips], [fault for _, faults in found for fault in faults]
    return _beside(sorted(file for file in folder.iterdir() if file.suffix.lower() in kinds))


def read_frames(clip: Clip, frames: int, height: int, width: int) -> Tensor:
    """The first ``frames`` of a clip, float [1, 3, frames, height, width] in -1 to 1.

    A picture of another size is scaled until it covers the wanted one, and cut to it around its middle. Raises
    ``OSError`` or ``ValueError`` for what cannot be decoded.
    """
    decoded = iter([_picture(clip.content())]) if clip.pictured else _decoded(clip.content(), frames)
    pictures = [_fitted(picture, height, width) for picture in decoded]
    if len(pictures) < frames:
        raise ValueError(f"only {len(pictures)} of {frames} frames can be decoded")
    return torch.stack(pictures, dim=1)[None]


def _beside(files: Sequence[Path]) -> tuple[list[Clip], list[Fault]]:
    clips: list[Clip] = []
    faults: list[Fault] = []
    for file in files:
        name, text = file.name, file.with_suffix(".txt")
        if text.is_file():
            _sort_in(Clip(name, text.read_text(encoding="utf-8", errors="replace").strip(), file), clips, faults)
        else:
            faults.append((name, f"no caption: there is no {text.name} beside it"))
    return clips, faults


def _listed(file: Path) -> tuple[list[Clip], list[Fault]]:
    clips: list[Clip] = []
    faults: list[Fault] = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        if not line.strip():
            continue
        place = f"{file.name} line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            faults.append((place, f"is no JSON: {error}"))
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
            faults.append((place, 'must read {"file": ..., "caption": ...}'))
        elif not isinstance(entry.get("caption"), str):
            faults.append((entry["file"], f"no caption in {place}"))
        else:
            _sort_in(Clip(entry["file"], entry["caption"].strip(), file.parent / entry["file"]), clips, faults)
    return sorted(clips, key=lambda clip: clip.name), faults


def _in_shard(shard: Path, kinds: tuple[str, ...]) -> tuple[list[Clip], list[Fault]]:
    clips: list[Clip] = []
    faults: list[Fault] = []
    try:
        with tarfile.open(shard) as members:
            names = [member.name for member in members if member.isfile()]
            captions = {_key(name): name for name in names if name.endswith(".txt")}
            for name in sorted(name for name in names if name.lower().endswith(kinds)):
                shown, text = f"{shard.name}/{name}", captions.get(_key(name))
                if text is None:
                    faults.append((shown, f"no caption: the shard has no {_key(name)}.txt"))
                else:
                    caption = _member(members, text).decode(errors="replace").strip()
                    _sort_in(Clip(shown, caption, shard, name), clips, faults)
    except tarfile.TarError as error:
        faults.append((shard.name, f"is no readable .tar: {error}"))
    return clips, faults


def _sort_in(clip: Clip, clips: list[Clip], faults: list[Fault]) -> None:
    if clip.caption:
        clips.append(clip)
    else:
        faults.append((clip.name, "its caption is empty"))


def _key(name: str) -> str:
    """What WebDataset groups members by: the path up to the first dot of the last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _member(shard: tarfile.TarFile, name: str) -> bytes:
    member = shard.extractfile(name)
    assert member is not None  # only names of regular files are kept
    return member.read()


def _fault(clip: Clip, frames: int) -> str | None:
    """Why a clip cannot be used, from what its container says; its frames are not decoded."""
    if clip.pictured:
        return _fault_of_picture(clip) if frames == 1 else f"is a picture, and {frames} frames are to be trained on"
    import av

    try:
        with av.open(io.BytesIO(clip.content())) as container:
            if not container.streams.video:
                return "has no video in it"
            count = sum(1 for packet in container.demux(container.streams.video[0]) if packet.size)
    except (OSError, ValueError) as error:  # PyAV's errors are both
        return f"cannot be read: {words(error)}"
    return None if count >= frames else f"has {count} frames, fewer than the {frames} to train on"


def _fault_of_picture(clip: Clip) -> str | None:
    try:
        with Image.open(io.BytesIO(clip.content())) as found:
            found.verify()
    except BROKEN as error:
        return f"cannot be read: {words(error)}"
    return None


def _picture(content: bytes) -> Tensor:
    """Upright as its camera noted, float [3, height, width] in -1 to 1."""
    try:
        with Image.open(io.BytesIO(content)) as found:
            pixels = np.array(ImageOps.exif_transpose(found).convert("RGB"))
    except BROKEN as error:
        raise ValueError(words(error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1


def _decoded(content: bytes, frames: int) -> Iterator[Tensor]:
    """Pictures as float [3, height, width] in -1 to 1."""
    import av

    with av.open(io.BytesIO(content)) as container:
        for number, frame in enumerate(container.decode(video=0), 1):
            yield torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1) / 127.5 - 1
            if number == frames:
                return


def _fitted(picture_CHW: Tensor, height: int, width: int) -> Tensor:
    tall, wide = picture_CHW.shape[1:]
    if (tall, wide) == (height, width):
        return picture_CHW
    factor = max(height / tall, width / wide)
    size = (max(height, round(tall * factor)), max(width, round(wide * factor)))
    scaled = interpolate(picture_CHW[None], size=size, mode="bicubic", antialias=True)[0].clamp(-1, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return scaled[:, top : top + height, left : left + width]
