"""``--image``: the picture that an image-to-video pipeline begins with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falloff.cli.checkpoint import Checkpoint
from falloff.cli.errors import USAGE, CommandError, told

if TYPE_CHECKING:
    from PIL.Image import Image


def opened(file: Path | None) -> Image | None:
    """The picture in RGB, upright as its camera noted. Raises ``CommandError`` for a file that holds none."""
    if file is None:
        return None
    from PIL import Image, ImageOps

    if not file.is_file():
        raise CommandError(f"there is no file {file}; --image takes a picture", USAGE)
    # Pillow tells of some broken files as of broken syntax, and of those too large to be safe by an error of its own
    broken = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
    with (
        told(*broken, before=f"--image {file} is no picture that can be read: ", code=USAGE),
        Image.open(file) as found,
    ):
        return ImageOps.exif_transpose(found).convert("RGB")


def check(checkpoint: Checkpoint, picture: Image | None) -> None:
    """Raise ``CommandError``, before weights are loaded, where the pipeline is known and a picture does not fit it."""
    if (kind := checkpoint.kind()) is not None:
        _check_kind(kind, picture)


def added(pipe: Any, call: Mapping[str, Any], picture: Image | None) -> dict[str, Any]:
    """The arguments of a call with a picture of the video's size: scaled, and cut at the sides that are too long.

    A pipeline that takes its size from the picture is given the whole. Raises ``CommandError`` for a picture where the
    pipeline takes none, and for none where it needs one.
    """
    _check_kind(type(pipe), picture)
    if picture is None:
        return dict(call)
    from PIL import Image, ImageOps

    from falloff.cli import pipeline

    width, height = (pipeline.size(pipe, call, name) for name in ("width", "height"))
    if width and height:
        # the pipelines themselves would stretch it
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    return {**call, "image": picture}


def takes(kind: type) -> bool:
    """Whether calls of a pipeline class can be given a picture."""
    return "image" in _parameters(kind)


def _check_kind(kind: type, picture: Image | None) -> None:
    if picture is not None and not takes(kind):
        raise CommandError(f"{kind.__name__} takes no picture; leave --image out", USAGE)
    if picture is None and _needs(kind):
        raise CommandError(f"{kind.__name__} begins with a picture; give --image", USAGE)


def _needs(kind: type) -> bool:
    """Some image-to-video pipelines have a default of none, and fail by it."""
    if not takes(kind):
        return False
    return _parameters(kind)["image"].default is inspect.Parameter.empty or "ImageToVideo" in kind.__name__


def _parameters(kind: Any) -> Mapping[str, inspect.Parameter]:
    """Of a call of the class's instances."""
    return inspect.signature(kind.__call__).parameters
