"""The seam with ComfyUI: a MODEL whose self-attention a method plans.

ComfyUI calls a function in ``transformer_options["optimized_attention_override"]`` in place of its attention, and
wrappers of kind "diffusion_model" around every forward. The wrapper reads the grid and where the run stands, and
leaves them in ``transformer_options``, where the override finds them; nothing is patched. Cross-attention, text
refiners and whatever else is not over the video's tokens go to the attention there was before: the override that an
earlier node set, or ComfyUI's own. Imports no ComfyUI.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from falloff import kernels
from falloff.geometry import Grid
from falloff.hosts import UnsupportedModelError
from falloff.methods.base import Method
from falloff.reporting import Report
from falloff.schedule import Schedule
from falloff.session import DenseBackend, Position, Seat, Session

KEY = "falloff"
OVERRIDE = "optimized_attention_override"
WRAPPER = "diffusion_model"
BRANCHES = {(0,): "cond", (1,): "uncond", (0, 1): "cond_uncond", (1, 0): "cond_uncond"}
"""By ``cond_or_uncond``: one number for each part of the batch."""


TOLERANCE = 1e-4
"""Noise levels this close to each other, relatively, are the same."""

NOTHING_SEEN = "whole forwards: a step cache skipped them, or another node's override came after falloff"


@dataclass(frozen=True, kw_only=True)
class Family:
    """How to read one of ComfyUI's models, and those that inherit from it."""

    name: str
    model: str
    """Class name."""
    blocks: Mapping[str, str]
    """Module lists by ``block_type``, in the order of the layers."""
    text_side: Literal["after", "before"] | None = None
    """Where text stands in the self-attention calls; ``None``: there is none."""
    leading: tuple[str, ...] = ()
    """Arguments of the forward that put tokens of their own before the video's."""


FAMILIES = (
    Family(name="Wan", model="WanModel", blocks={"double": "blocks"}),
    Family(
        name="HunyuanVideo",
        model="HunyuanVideo",
        blocks={"double": "double_blocks", "single": "single_blocks"},
        text_side="after",
        leading=("ref_latent",),
    ),
)


def family_of(diffusion_model: object) -> Family:
    """The family of ComfyUI's diffusion model. Raises ``UnsupportedModelError`` for a model of none."""
    names = {cls.__name__ for cls in type(diffusion_model).__mro__}
    for family in FAMILIES:
        if family.model in names:
            return family
    known = ", ".join(family.name for family in FAMILIES)
    raise UnsupportedModelError(
        f"falloff serves ComfyUI's models of the families {known}; got {type(diffusion_model).__name__}"
    )


@dataclass(frozen=True)
class Scene:
    """What the override knows of the forward that it is in."""

    family: Family
    model: Any
    grid: Grid | None


class Patch:
    """A session at work in one MODEL: ``around`` its forwards and in place of its ``attention``."""

    def __init__(self, session: Session, previous: Callable[..., Tensor] | None) -> None:
        self.session = session
        self.previous = previous
        """The override of an earlier node."""
        self.left_alone: Counter[str] = Counter()
        """Of the last run: what never came to the session, by reason."""
        self._track = Track()
        self._seen = 0

    def around(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's wrapper of a forward: ``executor(*args, **kwargs)`` goes on with it."""
        given = {**inspect.signature(executor.original).bind_partial(*args).arguments, **kwargs}
        options, latent = given["transformer_options"], given["x"]
        position = self._track.look(options)
        if position.run != self.session.position.run:
            self.left_alone.clear()
        family = family_of(executor.class_obj)
        grid = _grid(latent, executor.class_obj, given.get("time_dim_concat"))
        leading = [name for name in family.leading if given.get(name) is not None]
        reason = f"{leading[0]} puts tokens before the video's" if leading else None
        self.session.begin(position, latent.device, reason)
        options[KEY] = Scene(family, executor.class_obj, grid)
        before = self._seen
        try:
            return executor(*args, **kwargs)
        finally:
            self.session.end()
            if self._seen == before:
                self.left_alone[NOTHING_SEEN] += 1

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch left it untyped
    def attention(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """ComfyUI's override of one attention call: ``original`` is the attention it stands for."""
        self._seen += 1

        def dense() -> Tensor:
            if self.previous is not None:
                return self.previous(original, *args, **kwargs)
            return original(*args, **kwargs)

        call = AttentionCall(*args, **kwargs)
        scene = call.scene()
        if scene is None:
            return dense()
        seat = call.seat(scene)
        if isinstance(seat, str):
            self.left_alone[seat] += 1
            return dense()
        q, k, v = (call.per_head(x) for x in (call.q, call.k, call.v))
        backend = DenseBackend(
            name=lambda: getattr(original, "__name__", "ComfyUI"),
            run=lambda *unused: call.output_per_head(dense()),
        )
        out, _ = self.session.attend(
            seat, q, k, v, grid=scene.grid, dense=backend, mask=call.pairs_mask(), scale=call.more.get("scale")
        )
        return call.as_output(out)


class AttentionCall:
    """One call of ComfyUI's attention, with its arguments in their order.

    q, k, v are [B, S, H * D], or [B, H, S, D] when ``skip_reshape`` is set; so is the output, by
    ``skip_output_reshape``.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        heads: int,
        mask: Tensor | None = None,
        attn_precision: Any = None,
        skip_reshape: bool = False,
        skip_output_reshape: bool = False,
        **more: Any,
    ) -> None:
        self.q, self.k, self.v, self.heads, self.mask = q, k, v, heads, mask
        self.skip_reshape, self.skip_output_reshape, self.more = skip_reshape, skip_output_reshape, more
        self.queries, self.keys = (x.shape[2 if skip_reshape else 1] for x in (q, k))
        self.options = more.get("transformer_options") or {}

    def scene(self) -> Scene | None:
        """The forward it is in; ``None`` for cross-attention, a text refiner's call and one outside our forwards."""
        scene: Scene | None = self.options.get(KEY)
        if scene is None or self.queries != self.keys:
            return None
        return scene if scene.grid is None or self.queries >= scene.grid.tokens else None

    def seat(self, scene: Scene) -> Seat | str:
        """The layer that calls, or why the call is left alone."""
        family, index = scene.family, self.options.get("block_index")
        if index is None:
            return "no block_index: this ComfyUI does not tell the layer; a newer one does"
        if self.more.get("enable_gqa"):
            return "grouped queries"
        kind = self.options.get("block_type", "double")
        if kind not in family.blocks:
            return f"block_type {kind!r} is unknown in {family.name}"
        layers = {name: len(getattr(scene.model, path)) for name, path in family.blocks.items()}
        names = list(layers)
        first = sum(layers[name] for name in names[: names.index(kind)])
        return Seat(model=0, layer=first + index, layers=sum(layers.values()), text_side=family.text_side)

    def per_head(self, x: Tensor) -> Tensor:
        """[B, S, H, D]."""
        return x.transpose(1, 2) if self.skip_reshape else _split(x, self.heads)

    def output_per_head(self, out: Tensor) -> Tensor:
        """[B, S, H, D]."""
        return out.transpose(1, 2) if self.skip_output_reshape else _split(out, self.heads)

    def as_output(self, out_BSHD: Tensor) -> Tensor:
        return out_BSHD.transpose(1, 2) if self.skip_output_reshape else out_BSHD.flatten(2)

    def pairs_mask(self) -> Tensor | None:
        """The mask with all four axes [B|1, H|1, Sq|1, Sk]; ComfyUI leaves out heads, then the batch."""
        if self.mask is None or self.mask.ndim >= 4:
            return self.mask
        return self.mask[:, None] if self.mask.ndim == 3 else self.mask[None, None]


class Track:
    """Which run and step a forward belongs to, from its noise level among those of the run."""

    def __init__(self) -> None:
        self._run = -1
        self._step = 0
        self._sigmas: Tensor | None = None
        self._levels: list[float] = []
        self._level = 0.0

    def look(self, options: Mapping[str, Any]) -> Position:
        """A step reaches from its own noise level to just above the next one's, as solvers look in between.

        Noise that a solver adds within a run leads to no earlier step. Reading ``sigmas`` waits for the device,
        once a forward.
        """
        sigmas, now = options.get("sample_sigmas"), options.get("sigmas")
        branch = BRANCHES.get(tuple(options.get("cond_or_uncond", ())), "mixed")
        if sigmas is None or now is None:
            self._run = max(self._run, 0)
            return Position(run=self._run, branch=branch)
        level = float(now.max()) * (1 + TOLERANCE)
        if sigmas is not self._sigmas or (level >= self._levels[0] > self._level):
            self._sigmas, self._levels = sigmas, [float(each) for each in sigmas[:-1]]
            self._run += 1
            self._step = 0
        self._level = level
        self._step = max(self._step, sum(each * (1 + 2 * TOLERANCE) >= level for each in self._levels) - 1)
        return Position(run=self._run, step=self._step, steps=len(self._levels), branch=branch)


def patch(
    model: Any, method: Method, *, schedule: Schedule | None = None, kernel: str = "auto", timing: bool = False
) -> Any:
    """A clone of ComfyUI's MODEL whose self-attention the method plans; the given one stays as it is.

    ``schedule``: what stays dense; ``None`` takes the method's own. ``kernel``: "auto", or the one kernel to use.
    A MODEL that falloff serves already gets the new settings in place of the old ones.

    Raises ``UnsupportedModelError`` for models of no known family, and ``ValueError`` for unknown kernels.
    """
    family_of(model.get_model_object("diffusion_model"))
    names = ("auto", *(name for name, _, _ in kernels.available()))
    if kernel not in names:
        raise ValueError(f"unknown kernel {kernel!r}; choose one of {', '.join(names)}")
    if method.learns:
        raise ValueError(f"{method.name} as it is set has trained parameters, for which there is no node yet")
    clone = model.clone()
    options = clone.model_options.setdefault("transformer_options", {})
    previous = options.get(OVERRIDE)
    before = _patch_behind(previous)
    if before is not None:
        clone.remove_wrappers_with_key(WRAPPER, KEY)
        previous = before.previous
    session = Session(method, schedule=schedule or method.schedule, kernel=kernel, timing=timing)
    ours = Patch(session, previous)
    clone.add_wrapper_with_key(WRAPPER, KEY, ours.around)
    options[OVERRIDE] = ours.attention
    return clone


def report(model: Any) -> Report:
    """What the method did in the last run of a patched MODEL. Raises ``ValueError`` for one that is not."""
    return patch_of(model).session.report()


def describe(model: Any) -> str:
    """The report of a patched MODEL, for reading, with the calls that never came to the method."""
    ours = patch_of(model)
    lines = [f"{'left alone':<18}{reason}: {count} calls" for reason, count in ours.left_alone.items()]
    return "\n".join([str(ours.session.report()), *lines])


def patch_of(model: Any) -> Patch:
    """The patch of a MODEL. Raises ``ValueError`` for one without."""
    wrappers = model.get_wrappers(WRAPPER, KEY)
    if not wrappers:
        raise ValueError("falloff is not at work in this MODEL; connect the one that the falloff node puts out")
    found: Patch = wrappers[-1].__self__
    return found


def _patch_behind(override: Any | None) -> Patch | None:
    behind = getattr(override, "__self__", None)
    return behind if isinstance(behind, Patch) else None


def _grid(latent: Any, model: Any, more_frames: Tensor | None) -> Grid | None:
    """The grid of a latent video [B, C, F, H, W], which ComfyUI pads to whole patches; ``None`` for an image."""
    if latent.ndim != 5:
        return None
    frames = latent.shape[2] + (more_frames.shape[2] if more_frames is not None else 0)
    sizes = zip((frames, *latent.shape[3:]), model.patch_size, strict=True)
    return Grid(*(-(-size // patch) for size, patch in sizes))


def _split(x: Tensor, heads: int) -> Tensor:
    split: Tensor = x.unflatten(2, (heads, -1))  # type: ignore[no-untyped-call]  # PyTorch left it untyped
    return split
