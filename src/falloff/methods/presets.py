"""Published settings as data: a method, its schedule, and where they come from.

Shares of steps stand for the published counts (12 of 50 steps is 0.24), so that other step counts keep the
proportion. Radial's widths and frame drop are the published ones; its blocks follow the coverage rule, whose densities
lie within 0.7 points of the published code's.
"""

from __future__ import annotations

from dataclasses import dataclass

from falloff.methods.adaspa import AdaSpa
from falloff.methods.base import Method
from falloff.methods.radial import Radial
from falloff.methods.sparge import SpargeAttn
from falloff.methods.sta import SlidingTile
from falloff.methods.svg1 import SVG1
from falloff.methods.svg2 import SVG2
from falloff.methods.xattention import XAttention
from falloff.schedule import Schedule

PAPER = "arXiv:2506.19852"
SCRIPTS = "mit-han-lab/radial-attention, inference scripts"
SVG_SCRIPTS = "svg-project/Sparse-VideoGen, inference scripts"
SVG2_PAPER = "arXiv:2505.18875"
NOTHING_DENSE = Schedule(dense_first=0, dense_layers=())


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings someone published: ``enable(pipe, preset.method, schedule=preset.schedule)``.

    evidence: the report behind the settings. None of these has been measured here on the real weights.
    """

    method: Method
    schedule: Schedule
    evidence: str


def _radial(decay: float, block: int = 128, sink_frames: int = 1) -> Radial:
    return Radial(decay=decay, block=block, sink_frames=sink_frames, frame_drop="published")


PRESETS: dict[str, Preset] = {
    "radial/wan2.1-14b": Preset(
        method=_radial(0.2),
        schedule=Schedule(dense_first=0.24, dense_layers=(0,)),
        evidence=f"{SCRIPTS}: 768x1280, 69 frames, 12 of 50 steps dense; {PAPER} Table 1: 23.9 dB PSNR, 1.77x",
    ),
    "radial/wan2.1-14b-2x": Preset(
        method=_radial(1.0),
        schedule=Schedule(dense_first=2, dense_layers=(0, 1)),
        evidence=f"{SCRIPTS}: 720x1280, 161 frames, with a length LoRA; {PAPER} Table 2: 2.01x",
    ),
    "radial/wan2.2-a14b": Preset(
        method=_radial(0.8, block=64),
        schedule=Schedule(dense_first=0.275, dense_layers=(0,)),
        evidence=f"{SCRIPTS}: 768x1280, 77 frames, 11 of 40 steps dense over both experts",
    ),
    "radial/hunyuan": Preset(
        method=_radial(0.95, sink_frames=0),
        schedule=Schedule(dense_first=0.24, dense_layers=()),
        evidence=f"{SCRIPTS}: 768x1280, 117 frames, 12 of 50 steps dense; {PAPER} Table 1: 27.3 dB PSNR, 1.88x",
    ),
    "radial/hunyuan-4x": Preset(
        method=_radial(1.0),
        schedule=Schedule(dense_first=2, dense_layers=(0, 1)),
        evidence=f"{SCRIPTS}: 720x1280, 509 frames, with a length LoRA; {PAPER} Table 2: 3.71x",
    ),
    "radial/mochi": Preset(
        method=_radial(1.0),
        schedule=Schedule(dense_first=12, dense_layers=()),
        evidence=f"{SCRIPTS}: stub with 12 dense steps; its decay is not published, 1 is the paper's width",
    ),
    "radial/mochi-4x": Preset(
        method=_radial(1.0),
        schedule=Schedule(dense_first=2, dense_layers=(0, 1)),
        evidence=f"{PAPER} Table 2: 480x848, 667 frames, with a length LoRA, 2.57x",
    ),
    "svg2/paper": Preset(
        method=SVG2(q_clusters=100, k_clusters=500, first_iterations=50, iterations=2, span=0),
        schedule=Schedule(dense_first=0.3, dense_layers=()),
        evidence=f"{SVG2_PAPER}: Wan2.1-T2V-14B 25.8 dB PSNR at 29.5%, 1.60x; HunyuanVideo 30.5 dB at 25.5%, 2.30x",
    ),
    "svg2/wan2.1-14b": Preset(
        method=SVG2(q_clusters=300, k_clusters=1000, first_iterations=50, iterations=2, span=0),
        schedule=Schedule(dense_first=0.2),
        evidence=f"{SVG_SCRIPTS}: 720p, 81 frames, 10 of 50 steps dense",
    ),
    "svg2/wan2.1-14b-i2v-480p": Preset(
        method=SVG2(q_clusters=200, k_clusters=1000, first_iterations=50, iterations=2, span=0),
        schedule=Schedule(dense_first=0.2),
        evidence=f"{SVG_SCRIPTS}: 480p, 81 frames, 8 of 40 steps dense",
    ),
    "svg2/wan2.1-14b-i2v-720p": Preset(
        method=SVG2(q_clusters=300, k_clusters=1000, first_iterations=50, iterations=2, span=0),
        schedule=Schedule(dense_first=0.35),
        evidence=f"{SVG_SCRIPTS}: 720p, 81 frames, 14 of 40 steps dense",
    ),
    "svg2/hunyuan": Preset(
        method=SVG2(q_clusters=400, k_clusters=1000, first_iterations=50, iterations=2, span=0),
        schedule=Schedule(dense_first=0.1),
        evidence=f"{SVG_SCRIPTS}: 720p, 129 frames, 5 of 50 steps dense",
    ),
    "svg2/hunyuan-480p": Preset(
        method=SVG2(q_clusters=200, k_clusters=1000, first_iterations=50, iterations=2, span=0),
        schedule=Schedule(dense_first=0.04, dense_layers=()),
        evidence=f"{SVG_SCRIPTS}: 480p, 129 frames, 2 of 50 steps dense",
    ),
    "adaspa/hunyuan": Preset(
        method=AdaSpa(),
        schedule=Schedule(dense_first=0.2, dense_layers=()),
        evidence="arXiv:2502.21079: 720p, 8 s, searches at steps 10 and 30 of 50; 29.1 dB PSNR, 1.78x",
    ),
    "svg1/wan2.1-14b": Preset(
        method=SVG1(density=0.3),
        schedule=Schedule(dense_first=0.2),
        evidence=f"{SVG_SCRIPTS}: 720p, 81 frames, 10 of 50 steps dense",
    ),
    "svg1/hunyuan": Preset(
        method=SVG1(density=0.25),
        schedule=Schedule(dense_first=0.1),
        evidence=f"{SVG_SCRIPTS}: 720p, 129 frames, 5 of 50 steps dense",
    ),
    "svg1/hunyuan-480p": Preset(
        method=SVG1(density=0.2),
        schedule=Schedule(dense_first=0.04, dense_layers=()),
        evidence=f"{SVG_SCRIPTS}: 480p, 129 frames, 2 of 50 steps dense",
    ),
    "svg1/cogvideox": Preset(
        method=SVG1(density=0.25, rows=32),
        schedule=Schedule(dense_first=0.2, dense_layers=(0, 1)),
        evidence=f"{SVG_SCRIPTS}: CogVideoX, a fifth of the steps dense",
    ),
    "sta/hunyuan": Preset(
        method=SlidingTile(tile=(6, 8, 8), window=(3, 3, 3)),
        schedule=NOTHING_DENSE,
        evidence="arXiv:2502.04507: 768x1280, 117 frames, untrained: 91% sparse, 945 s to 268 s on an H100, VBench "
        "82.71% to 80.58%",
    ),
    "xattention/hunyuan": Preset(
        method=XAttention(tau=0.9, stride=8),
        schedule=Schedule(dense_first=0.1, dense_layers=()),
        evidence="arXiv:2503.16428, video table: 720p, 129 frames, 5 of 50 steps dense: 21.5 dB PSNR at 34.4% density",
    ),
    "xattention/hunyuan-fine": Preset(
        method=XAttention(tau=0.95, stride=8),
        schedule=Schedule(dense_first=0.1, dense_layers=()),
        evidence="arXiv:2503.16428, video table: 720p, 129 frames, 5 of 50 steps dense: 23.5 dB PSNR at 45.5% density",
    ),
    "sparge/wan2.1": Preset(
        method=SpargeAttn(mode="topk", keep=0.5, theta=-0.1),
        schedule=NOTHING_DENSE,
        evidence="thu-ml/SpargeAttn, the API its README recommends and its Wan examples; runs in 8 bits there",
    ),
    "sparge/wan2.2-a14b": Preset(
        method=SpargeAttn(mode="topk", keep=0.4, theta=-0.1),
        schedule=NOTHING_DENSE,
        evidence="thu-ml/SpargeAttn, README example for Wan2.2; runs in 8 bits there",
    ),
    "sparge/wan2.1-i2v-480p": Preset(
        method=SpargeAttn(mode="topk", keep=0.2, theta=-0.1),
        schedule=NOTHING_DENSE,
        evidence="LightX2V, Wan I2V 480p configuration",
    ),
    "sparge/mass": Preset(
        method=SpargeAttn(mode="mass_le", keep=0.98, theta=0.6),
        schedule=NOTHING_DENSE,
        evidence="thu-ml/SpargeAttn, defaults of its API by cumulative mass, the paper's rule",
    ),
}


def preset(name: str) -> Preset:
    """The published settings of that name; raises ``ValueError`` with the known names for another."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
