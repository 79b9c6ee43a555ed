"""A comparison made up for tests of what is told about one."""

import numpy as np
import pytest

from falloff.evaluation.comparison import Arm, Comparison, MethodArm, Pair
from falloff.evaluation.decay import DecayCurve, fit
from falloff.evaluation.video import encode
from falloff.reporting import Record
from falloff.reporting.picture import picture


def clip(shift: float, frames: int = 9, side: int = 64) -> bytes:
    t, y, x = np.meshgrid(np.arange(frames), np.arange(side), np.arange(side), indexing="ij")
    ball = np.exp(-((x - 12 - 4 * t - shift) ** 2 + (y - 32) ** 2) / 60)
    return encode(np.stack([ball, 0.6 * ball + 0.1, 0.25 + 0 * ball], -1), fps=8)


def curve(axis: str, a: float) -> DecayCurve:
    x = np.arange(12)
    wobble = 1 + 0.15 * np.sin(3.0 * x)
    mean = 0.1 * np.exp(-a * x) * wobble
    layers = [(mean * scale).tolist() for scale in (0.4, 0.8, 1.8)]
    return DecayCurve(axis, x.tolist(), mean.tolist(), layers, fit(x, mean), 1 / 1088)


def run_picture() -> str:
    return picture([record(step, layer) for step in range(8) for layer in range(6)])


def record(step: int, layer: int) -> Record:
    reason = "dense first step" if step < 2 else "dense layer" if layer == 0 else None
    return Record(
        run=0,
        step=step,
        model=0,
        layer=layer,
        branch="cond",
        density=0.341 if reason is None else 1.0,
        kernel="cpu" if reason is None else "native",
        reason=reason,
        plan_seconds=0.0,
        attention_seconds=0.001,
    )


def method_arm(label: str, seconds: float, psnr: float, shift: float) -> MethodArm:
    rows = np.arange(34)
    near = np.abs(rows[:, None] - rows) < 4
    return MethodArm(
        label=label,
        seconds=[seconds, seconds * 1.04],
        peak_bytes=[310 << 20, None],
        others=[0.021, 0.014],
        psnr=[psnr, psnr - 1.5],
        ssim=[0.93, 0.91],
        attention_seconds=2.1,
        forward_seconds=5.2,
        call_seconds=5.7,
        videos=[clip(shift), clip(2 * shift)],
        method="radial",
        settings={"decay": 0.2, "block": "auto"},
        schedule={"dense_first": 0.25, "dense_last": 0, "dense_layers": (0,)},
        density=0.341,
        effective_density=0.552,
        recall=0.87,
        recall_by_layer={0: 0.82, 1: 0.92},
        plan_seconds=0.004,
        kernel="cpu: first that can run this call",
        kernels={"cpu": 480},
        reasons={"dense first step": 120, "dense layer": 60},
        block_map=(near * 255).astype(np.uint8),
        run_picture=run_picture(),
    )


@pytest.fixture
def comparison() -> Comparison:
    return Comparison(
        model="models/tiny <wan>",
        command='falloff compare --prompt "a <b>bold</b> & red 3"',
        created="2026-01-01T00:00:00+00:00",
        pairs=[Pair("a <b>bold</b> & red 3 moves right", 0), Pair('a "quoted" prompt', 7)],
        call_arguments={"num_frames": 9, "num_inference_steps": 4},
        fps=8,
        dense=Arm(
            label="dense",
            seconds=[8.0, 8.2],
            peak_bytes=[300 << 20, 301 << 20],
            others=[None, None],
            psnr=[float("inf")] * 2,
            ssim=[1.0, 1.0],
            attention_seconds=4.4,
            forward_seconds=7.1,
            call_seconds=8.1,
            videos=[clip(0), clip(0)],
        ),
        methods=[
            method_arm("radial decay=0.2", 5.6, 31.2, 1.0),
            method_arm("radial decay=0.9", 6.6, 36.2, 0.5),
        ],
        decay=[curve("time", 0.4), curve("raster", 0.2), curve("space", 0.5)],
        machine={"device": "cpu", "processor": "a processor", "cores": "2"},
        versions={"python": "3.11", "torch": "2.13"},
    )
