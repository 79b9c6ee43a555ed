"""How each family of pipelines trains: what its transformer is given, and what it is to put out for a noised latent.

They differ in how latents are normalised, how text goes in, how the noise level s in 0 to 1 is told, in the sign of the
velocity, and in the path that leads from the clip to noise. Every file of diffusers' pipelines does this backwards;
tests hold the arguments made here against those a pipeline makes.
"""

from __future__ import annotations

from typing import Any

from falloff.training.errors import TrainingError
from falloff.training.families.allegro import ALLEGRO
from falloff.training.families.cogvideox import COGVIDEOX, COGVIDEOX_IMAGE
from falloff.training.families.hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_IMAGE
from falloff.training.families.hunyuan_video15 import HUNYUAN_VIDEO_15, HUNYUAN_VIDEO_15_IMAGE
from falloff.training.families.kandinsky5 import KANDINSKY
from falloff.training.families.ltx import LTX, LTX_IMAGE
from falloff.training.families.ltx2 import LTX2
from falloff.training.families.mochi import MOCHI
from falloff.training.families.pictures import FLUX, FLUX2, QWEN_IMAGE
from falloff.training.families.wan import WAN, WAN_IMAGE
from falloff.training.family import Family

FAMILIES = (
    WAN,
    WAN_IMAGE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_IMAGE,
    HUNYUAN_VIDEO_15,
    HUNYUAN_VIDEO_15_IMAGE,
    MOCHI,
    LTX,
    LTX_IMAGE,
    LTX2,
    COGVIDEOX,
    COGVIDEOX_IMAGE,
    KANDINSKY,
    ALLEGRO,
    FLUX,
    FLUX2,
    QWEN_IMAGE,
)


def family_of(pipe: Any) -> Family:
    """Raises ``TrainingError`` for a pipeline that cannot be trained here, with the reason."""
    name = type(pipe).__name__
    for family in FAMILIES:
        if name in family.pipelines:
            if (reason := family.refuse(pipe)) is not None:
                raise TrainingError(f"this {name} cannot be trained: {reason}")
            return family
    known = ", ".join(pipeline for family in FAMILIES for pipeline in family.pipelines)
    raise TrainingError(f"{name} cannot be trained here; the pipelines that can are {known}")
