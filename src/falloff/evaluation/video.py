"""Videos as H.264 in mp4, which every browser plays; single frames as PNG too.

Frames are uint8 [F, H, W, 3], or float in 0 to 1 of the same shape.
"""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import interpolate

from falloff.evaluation import files

QUALITY = "14"
"""x264's constant rate factor: low enough that the codec does not blur what a comparison is to show."""
BT709 = 1
PNG = b"\x89PNG"

Frames = NDArray[np.uint8]


def to_bytes(video_FHWC: NDArray[Any]) -> Frames:
    """Float values in 0 to 1 as uint8; uint8 as it is. Raises ``ValueError`` on any other shape or type."""
    if video_FHWC.ndim != 4 or video_FHWC.shape[-1] != 3 or not video_FHWC.size:
        raise ValueError(f"a video has shape [frames, height, width, 3], got {video_FHWC.shape}")
    if video_FHWC.dtype == np.uint8:
        return video_FHWC
    if not np.issubdtype(video_FHWC.dtype, np.floating):
        raise ValueError(f"a video is uint8, or float in 0 to 1, got {video_FHWC.dtype}")
    scaled: Frames = (video_FHWC.clip(0, 1) * 255).round().astype(np.uint8)
    return scaled


def encode(video_FHWC: NDArray[Any], fps: float) -> bytes:
    """An mp4 file's content. An odd height or width repeats its last row or column: yuv420p knows even sizes only."""
    import av

    if not fps > 0:
        raise ValueError(f"fps = {fps} must be above 0")
    frames = to_bytes(video_FHWC)
    frames = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": QUALITY}
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = BT709
        for frame_HWC in frames:
            frame = av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace="ITU709")))
        container.mux(stream.encode())
    return file.getvalue()


def encode_frame(video_FHWC: NDArray[Any]) -> bytes:
    """A PNG file's content. Raises ``ValueError`` for more than one frame."""
    frames = to_bytes(video_FHWC)
    if len(frames) != 1:
        raise ValueError(f"a picture is one frame, got {len(frames)}")
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, "PNG")
    return file.getvalue()


def as_file(video_FHWC: NDArray[Any], fps: float) -> bytes:
    """A file's content: PNG of one frame, mp4 of more."""
    return encode_frame(video_FHWC) if len(video_FHWC) == 1 else encode(video_FHWC, fps)


def is_picture(content: bytes) -> bool:
    """Whether a file's content is a PNG, not a video."""
    return content.startswith(PNG)


def write(path: Path, video_FHWC: NDArray[Any], fps: float) -> None:
    """Write a .png file of one frame or an mp4 file, whole or not at all.

    Raises ``OSError`` when its folder cannot be written to, ``ValueError`` for a .png of more than one frame.
    """
    files.check_writable(path.parent)
    files.write(path, encode_frame(video_FHWC) if path.suffix.lower() == ".png" else encode(video_FHWC, fps))


def read(source: Path | bytes) -> Frames:
    """The frames of a video or picture, a file or its content, uint8 [F, H, W, 3]."""
    import av

    with av.open(io.BytesIO(source) if isinstance(source, bytes) else str(source)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def shrink(frames_FHWC: Frames, side: int) -> Frames:
    """Frames whose longer side is at most ``side`` pixels, averaged over the area of every pixel."""
    height, width = frames_FHWC.shape[1:3]
    factor = min(1.0, side / max(height, width))
    size = (round(height * factor), round(width * factor))
    pixels = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2).float()
    resized = interpolate(pixels, size=size, mode="area").round().to(torch.uint8)
    return np.asarray(resized.permute(0, 2, 3, 1))
