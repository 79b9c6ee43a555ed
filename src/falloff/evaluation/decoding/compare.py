"""Sequential decoding against parallel decoding, on the same classes and seeds: what was gained, what it cost."""

from __future__ import annotations

import dataclasses
import datetime
import io
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from statistics import fmean
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from falloff.decoding.diagnostics import attention_by_distance, cost, even_attention_by_distance
from falloff.decoding.order import OrderName, make_orders
from falloff.decoding.pipeline import LPDPipeline
from falloff.decoding.sizes import group_sizes
from falloff.evaluation import machine
from falloff.evaluation.compare import Progress
from falloff.evaluation.decay import DecayCurve, fit
from falloff.evaluation.decoding.comparison import Arm, Asked, Comparison, Scores
from falloff.evaluation.generate import check_arguments, quiet

ORDERS: dict[str, OrderName] = {
    "LPD": "locality",
    "planned order": "planned",
    "random order": "random",
    "raster order": "raster",
}
"""Ways to decode in parallel, by label."""
SEQUENTIAL: OrderName = "random"
"""Of one token after another: the order that models are trained on."""
SCRATCH_BYTES = 256 << 20
"""Attention is held for as many pictures as fit in this, and one at least."""
OURS = ("class_labels", "order", "sizes", "image", "mask")
"""Arguments of a call that are set here, besides those of every pipeline."""


class Judge(Protocol):
    """Reads pictures: a classifier of the model's classes that knows real pictures."""

    def score(self, images: Tensor, labels: Tensor) -> Mapping[str, Any]:
        """``accuracy`` and ``frechet`` of pictures [n, C, H, W] in [-1, 1] that were asked to show ``labels``.

        ``frechet`` is ``None`` of too few pictures.
        """


@dataclass(frozen=True)
class _Way:
    label: str
    order: OrderName
    sizes: tuple[int, ...]
    twin: bool = False
    """One token after another, but in the order that these sizes give, and with the same draws."""


class _Drawn(NamedTuple):
    """A picture: its codes int64 [H, W], its pixels [C, H, W] in [0, 1], and what it took."""

    codes_HW: Tensor
    pixels_CHW: Tensor
    seconds: float
    peak_bytes: int | None


def compare(
    pipe: LPDPipeline,
    classes: Sequence[int],
    *,
    seeds: Iterable[int] = (0,),
    num_inference_steps: int = 20,
    judge: Judge | None = None,
    progress: Callable[[Progress], None] | None = None,
    **call_arguments: Any,
) -> Comparison:
    """Draw every class with every seed one token after another, and in ``num_inference_steps`` steps by every order.

    Pictures are drawn one at a time, the ways in turn and starting with another one for each picture, so that a
    machine that warms up or slows down favours none; a short run comes first and is not counted. ``judge`` reads all
    of a way's pictures. Without one, each way's order is decoded one token after another too, with the same draws:
    what differs is what deciding tokens together has changed. ``call_arguments`` go to the pipeline as they are.

    Raises ``ValueError`` for no classes or seeds and for what the pipeline refuses, ``TypeError`` for arguments that
    it does not take or that are set here.
    """
    asked = [Asked(*pair) for pair in product(classes, seeds)]
    if not asked:
        raise ValueError("a comparison needs at least one class and one seed")
    check_arguments(pipe, call_arguments, OURS)
    tokens = pipe.transformer.tokens
    one_by_one, together = group_sizes(tokens, tokens), group_sizes(tokens, num_inference_steps)
    pipe.transformer.check_labels(torch.tensor(classes))
    parallel = [_Way(label, order, together) for label, order in ORDERS.items()]
    ways = [_Way("sequential", SEQUENTIAL, one_by_one), *parallel]
    if judge is None:
        ways += [dataclasses.replace(way, twin=True) for way in parallel if way.order != SEQUENTIAL]
    with quiet(pipe):
        _draw(pipe, _Way("warming up", SEQUENTIAL, group_sizes(tokens, min(2, tokens))), asked[0], call_arguments)
        told = _Told(progress, len(ways) * len(asked))
        rows = [_draw_all(pipe, ways, asked, number, call_arguments, told) for number in range(len(asked))]
    drawn = [list(column) for column in zip(*rows, strict=True)]
    twins = {way.order: column for way, column in zip(ways, drawn, strict=True) if way.twin}
    if twins:
        twins[SEQUENTIAL] = drawn[0]  # in this order the sequential picture itself
    arms = [
        _arm(pipe, way, column, twins.get(way.order), asked, call_arguments, judge)
        for way, column in zip(ways, drawn, strict=True)
        if not way.twin
    ]
    return Comparison(
        model=str(getattr(pipe.config, "_name_or_path", "") or type(pipe).__name__),
        command=_command(classes, asked, num_inference_steps, call_arguments),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        asked=asked,
        call_arguments={"num_inference_steps": num_inference_steps, **call_arguments},
        sequential=arms[0],
        parallel=arms[1:],
        chance=_chance(list(twins.values())),
        attention=attention_curve(pipe, torch.stack([each.codes_HW for each in drawn[0]]), asked),
        machine=machine.describe(torch.device(pipe._execution_device)),
        versions=machine.versions(),
    )


class _Told:
    """Counts pictures for a listener."""

    def __init__(self, progress: Callable[[Progress], None] | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def picture(self, doing: str) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(Progress(self._done, self._total, doing))


def _draw_all(
    pipe: LPDPipeline,
    ways: Sequence[_Way],
    asked: Sequence[Asked],
    number: int,
    call_arguments: Mapping[str, Any],
    told: _Told,
) -> list[_Drawn]:
    """One picture by every way, in the order of ``ways``, starting with another way for every picture."""
    drawn: dict[int, _Drawn] = {}
    for place in range(len(ways)):
        index = (number + place) % len(ways)
        drawn[index] = _draw(pipe, ways[index], asked[number], call_arguments)
        told.picture(f"{ways[index].label}{', one by one' * ways[index].twin}, {number + 1} of {len(asked)}")
    return [drawn[index] for index in range(len(ways))]


def _draw(pipe: LPDPipeline, way: _Way, asked: Asked, call_arguments: Mapping[str, Any]) -> _Drawn:
    device = torch.device(pipe._execution_device)
    generator = torch.Generator().manual_seed(asked.seed)
    memory = machine.PeakMemory(device)
    machine.synchronize(device)
    start = time.perf_counter()
    order: Any = way.order
    sizes = way.sizes
    if way.twin:
        order = _orders(pipe, way, generator, call_arguments)
        sizes = (1,) * pipe.transformer.tokens
    codes = pipe(
        asked.label, order=order, sizes=sizes, generator=generator, output_type="latent", **call_arguments
    ).images
    pixels = pipe.draw(codes, "pt")
    machine.synchronize(device)
    seconds = time.perf_counter() - start
    return _Drawn(codes[0].cpu(), pixels[0].float().cpu(), seconds, memory.read())


def _arm(
    pipe: LPDPipeline,
    way: _Way,
    drawn: list[_Drawn],
    twin: list[_Drawn] | None,
    asked: Sequence[Asked],
    call_arguments: Mapping[str, Any],
    judge: Judge | None,
) -> Arm:
    guided = call_arguments.get("guidance_scale") != 1
    counted = cost(pipe.transformer, way.sizes, guided=guided)
    return Arm(
        label=way.label,
        order=way.order,
        sizes=way.sizes,
        seconds=[each.seconds for each in drawn],
        peak_bytes=[each.peak_bytes for each in drawn],
        agreement=None if twin is None or twin is drawn else list(map(_agreement, drawn, twin)),
        scores=None if judge is None else _scores(judge, drawn, asked),
        flops=counted.flops,
        cache_bytes=counted.cache_bytes,
        groups=_groups(pipe, way, asked[0].seed, call_arguments),
        pictures=[_png(each.pixels_CHW) for each in drawn],
    )


def _agreement(one: _Drawn, other: _Drawn) -> float:
    return float((one.codes_HW == other.codes_HW).double().mean())


def _chance(twins: Sequence[list[_Drawn]]) -> float | None:
    """Agreement of pictures of one class that only share it: each was decoded one by one in an order of its own."""
    pairs = [_agreement(*both) for a, b in combinations(twins, 2) for both in zip(a, b, strict=True)]
    return fmean(pairs) if pairs else None


def _scores(judge: Judge, drawn: list[_Drawn], asked: Sequence[Asked]) -> Scores:
    images = torch.stack([each.pixels_CHW for each in drawn]) * 2 - 1
    found = judge.score(images, torch.tensor([each.label for each in asked]))
    return Scores(len(drawn), found["accuracy"], found["frechet"])


def _orders(pipe: LPDPipeline, way: _Way, generator: torch.Generator, call_arguments: Mapping[str, Any]) -> Tensor:
    """The order [1, N] of a picture: as the pipeline does, it is the first that is drawn from a generator."""
    config, rule = pipe.transformer.config, call_arguments.get("locality")
    return make_orders(way.order, config.grid_height, config.grid_width, way.sizes, 1, generator, locality=rule)


def _groups(pipe: LPDPipeline, way: _Way, seed: int, call_arguments: Mapping[str, Any]) -> NDArray[np.uint8]:
    """Of the first picture."""
    order = _orders(pipe, way, torch.Generator().manual_seed(seed), call_arguments)[0].numpy()
    shade = 255 * (1 - np.arange(len(way.sizes)) / len(way.sizes))
    groups = np.empty(len(order), dtype=np.uint8)
    groups[order] = np.repeat(shade, way.sizes).round()
    return groups.reshape(pipe.transformer.config.grid_height, -1)


def attention_curve(pipe: LPDPipeline, codes_BHW: Tensor, asked: Sequence[Asked]) -> DecayCurve:
    """Attention of a query to one known token by their distance, where tokens are decoded one after another."""
    model = pipe.transformer
    tokens = model.tokens
    each = 4 * model.config.heads * (1 + 2 * tokens) ** 2
    count = max(1, min(len(codes_BHW), SCRATCH_BYTES // each))
    device = torch.device(pipe._execution_device)
    labels = torch.tensor([one.label for one in asked[:count]], device=device)
    generator, one_by_one = torch.Generator().manual_seed(0), group_sizes(tokens, tokens)
    height, width = model.config.grid_height, model.config.grid_width
    orders = make_orders(SEQUENTIAL, height, width, one_by_one, count, generator).to(device)
    found = attention_by_distance(model, codes_BHW[:count].flatten(1).to(device), labels, orders, one_by_one)
    layers = found.double().cpu().numpy()
    distance = np.flatnonzero(np.isfinite(layers).all(axis=0))
    mean = layers[:, distance].mean(axis=0)
    even = even_attention_by_distance(orders, one_by_one, width).nanmean()
    return DecayCurve(
        axis="picture",
        distance=distance.tolist(),
        mean=mean.tolist(),
        layers=layers[:, distance].tolist(),
        fit=fit(distance, mean),
        uniform=float(even),
    )


def _png(pixels_CHW: Tensor) -> bytes:
    from PIL import Image

    pixels = (pixels_CHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG", optimize=True)
    return file.getvalue()


def _command(classes: Sequence[int], asked: Sequence[Asked], steps: int, call_arguments: Mapping[str, Any]) -> str:
    seeds = list(dict.fromkeys(each.seed for each in asked))
    named = {"seeds": seeds, "num_inference_steps": steps, **call_arguments}
    arguments = "".join(f", {name}={value!r}" for name, value in named.items())
    return f"compare(pipe, {list(classes)!r}{arguments})"
