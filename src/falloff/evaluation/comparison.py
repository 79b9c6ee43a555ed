"""What a comparison found, as plain values."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from falloff.evaluation.decay import DecayCurve


@dataclass(frozen=True)
class Pair:
    """One prompt and seed; every list of a comparison has one entry a pair, in this order."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Arm:
    """One way to compute attention, over all pairs: its time, its memory, and how close it came to dense."""

    label: str
    seconds: list[float]
    peak_bytes: list[int | None]
    others: list[float | None]
    """Share of the processors that others took, 0 to 1."""
    psnr: list[float]
    ssim: list[float]
    attention_seconds: float
    """Inside self-attention, mean of a run."""
    forward_seconds: float
    """Inside the transformer, mean of a run, the time that making plans took left out."""
    call_seconds: float
    """The whole of those runs, mean, the time that making plans took left out."""
    videos: list[bytes] = dataclasses.field(repr=False)
    """mp4 files, or PNG of models that make images."""

    @property
    def attention_share(self) -> float:
        """Of the transformer's time, 0 to 1."""
        return self.attention_seconds / self.forward_seconds if self.forward_seconds else 0.0


@dataclass(frozen=True)
class MethodArm(Arm):
    """A method's arm: besides, what it computed and by which kernel."""

    method: str
    settings: dict[str, Any]
    schedule: dict[str, Any]
    density: float | None
    """Of the sparse calls; text included. ``None`` when every call was dense."""
    effective_density: float
    """Of all calls, the dense ones counted as 1."""
    recall: float | None
    """Share of dense attention on the pairs that the method's plans keep; ``None`` where it plans nothing."""
    recall_by_layer: dict[int, float]
    plan_seconds: float
    """Mean of a run."""
    kernel: str
    """The choice of the last sparse call, and why not another."""
    kernels: dict[str, int]
    """Sparse calls by kernel, all runs together."""
    reasons: dict[str, int]
    """Dense calls by reason, all runs together."""
    block_map: NDArray[np.uint8] | None = dataclasses.field(repr=False)
    """Share of computed pairs in the last sparse plan, 255 all; ``None`` when every call was dense."""
    run_picture: str = dataclasses.field(repr=False)
    """Layers and steps of the last run, SVG."""


@dataclass(frozen=True)
class Comparison:
    """Dense and each method on the same prompts and seeds."""

    model: str
    command: str
    created: str
    """UTC, ISO 8601."""
    pairs: list[Pair]
    call_arguments: dict[str, Any]
    fps: float
    dense: Arm
    """Plain dense: the time of reference; its PSNR and SSIM are the noise floor, dense against dense again."""
    methods: list[MethodArm]
    decay: list[DecayCurve]
    machine: dict[str, str]
    versions: dict[str, str]

    @property
    def attention_share_of_run(self) -> float:
        """Dense self-attention's share of the whole dense call, text encoder and autoencoder included, 0 to 1."""
        return min(1.0, self.dense.attention_seconds / self.dense.call_seconds)

    def speedups(self, arm: Arm) -> list[float]:
        """Dense time / the arm's, pair by pair."""
        return [dense / seconds for dense, seconds in zip(self.dense.seconds, arm.seconds, strict=True)]

    def speedup(self, arm: Arm) -> float:
        """Median over pairs."""
        return median(self.speedups(arm))

    def ceiling(self, density: float) -> float:
        """Speed-up of the whole call to expect when attention's time follows its density."""
        return attention_ceiling(self.attention_share_of_run, density)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for strict JSON: videos and maps left out, infinity (equal videos) as ``"inf"``."""
        values = dataclasses.asdict(dataclasses.replace(self, dense=_bare(self.dense), methods=[]))
        values["dense"]["attention_share"] = self.dense.attention_share
        values["attention_share_of_run"] = self.attention_share_of_run
        values["ceiling_without_attention"] = self.ceiling(0.0)
        values["methods"] = [self._method_values(arm) for arm in self.methods]
        for arm in (values["dense"], *values["methods"]):
            del arm["videos"]
        plain: dict[str, Any] = jsonable(values)
        return plain

    def _method_values(self, arm: MethodArm) -> dict[str, Any]:
        values = dataclasses.asdict(_bare(arm))
        del values["block_map"], values["run_picture"]
        return {
            **values,
            "attention_share": arm.attention_share,
            "speedup": self.speedup(arm),
            "speedups": self.speedups(arm),
            "predicted_speedup": self.ceiling(arm.effective_density),
        }


def attention_ceiling(share: float, density: float = 0.0) -> float:
    """Speed-up that sparse attention can reach, by Amdahl's law: ``1 / (1 - share + share * density)``.

    ``share``: attention's share of the time, 0 to 1; ``density``: computed / all token pairs, 0 to 1, taken to be
    attention's cost. ``inf`` when all the time is attention and none is left.
    """
    for name, value in (("share", share), ("density", density)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} = {value} is outside 0.0 to 1.0")
    rest = 1.0 - share + share * density
    return 1.0 / rest if rest else math.inf


def _bare(arm: Any) -> Any:
    """The arm without its videos, which are not worth a deep copy."""
    return dataclasses.replace(arm, videos=[])


def jsonable(value: Any) -> Any:
    """Plain values for strict JSON, infinity and what has no JSON as text."""
    if isinstance(value, dict):
        return {str(key): jsonable(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | None) else str(value)
