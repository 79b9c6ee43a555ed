"""The front door: attach a method to a pipeline, ask what it did, and leave again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from falloff import branch_file, kernels, methods
from falloff.branch_file import BranchError
from falloff.hosts import UnsupportedModelError, class_name, host_for
from falloff.methods.base import Method, plan_for
from falloff.plan import Plan
from falloff.recipe import Recipe
from falloff.reporting import Report
from falloff.schedule import Schedule
from falloff.session import Session

if TYPE_CHECKING:
    from falloff.hosts import Host
    from falloff.hosts.diffusers import Attachment

__all__ = [
    "AlreadyEnabledError",
    "BranchError",
    "NotEnabledError",
    "attention",
    "branches",
    "disable",
    "enable",
    "load_branches",
    "plan_for",
    "report",
    "save_branches",
    "using",
]
TRANSFORMERS = ("transformer", "transformer_2")
"""Where a diffusers pipeline keeps its transformers; Wan 2.2 has two."""
T = TypeVar("T")


class NotEnabledError(RuntimeError):
    """falloff is not attached to what was given."""


class AlreadyEnabledError(RuntimeError):
    """falloff is attached to what was given already."""


def enable(
    pipe: T,
    method: Method | str | Recipe,
    *,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    timing: bool = False,
    replace: bool = False,
) -> T:
    """Let a method plan the self-attention of a diffusers pipeline, a transformer or a list of transformers.

    ``method``: a method, its name for its default settings, or a recipe. ``schedule``: what stays dense; ``None``
    takes the recipe's or the method's own. ``kernel``: "auto" (or the recipe's), or the one kernel to use.
    ``timing``: measure attention and forwards too. Returns ``pipe``, the same object. When this raises, nothing was
    attached.

    Raises ``AlreadyEnabledError`` when a method is attached already, unless ``replace`` is set,
    ``UnsupportedModelError`` for models of no known family, ``RecipeError`` for another model's recipe,
    ``BranchError`` and ``OSError`` for a recipe whose learned parameters cannot be read, and
    ``ValueError`` for unknown methods and kernels, and for a method that leaves out pairs of frames on a model of
    images.
    """
    models = _models(pipe)
    hosts = [host_for(model) for model in models]
    learned = method.branches if isinstance(method, Recipe) else None
    if isinstance(method, Recipe):
        check_recipe(pipe, method)
        schedule = schedule or method.schedule
        kernel = method.kernel if kernel == "auto" else kernel
        method = method.method
    method = methods.get(method) if isinstance(method, str) else method
    if not isinstance(method, Method):
        raise TypeError(f"method must be a Method, the name of one or a Recipe, got {method!r}")
    _check_kernel(kernel)
    _check_frames(method, hosts)
    before = _attachments(models)
    if before and not replace:
        raise AlreadyEnabledError(
            f"falloff is already enabled here with {before[0].session.method}; pass replace=True, or disable it first"
        )
    from falloff.hosts import diffusers

    for attachment in before:
        diffusers.detach(attachment)
    layers = len(hosts[0].attention_paths(models[0]))
    session = Session(method, schedule=(schedule or method.schedule).named(layers), kernel=kernel, timing=timing)
    diffusers.attach(models, hosts, session, pipe if _is_pipeline(pipe) else None)
    if learned is not None:
        try:
            load_branches(pipe, learned)
        except BaseException:
            disable(pipe)
            raise
    return pipe


def disable(pipe: Any) -> None:
    """Leave the pipeline, the transformer or the list as it was. Raises ``NotEnabledError`` when not attached."""
    attachments = _enabled(pipe)
    from falloff.hosts import diffusers

    for attachment in attachments:
        diffusers.detach(attachment)


@contextmanager
def using(
    pipe: T,
    method: Method | str | Recipe,
    *,
    schedule: Schedule | None = None,
    kernel: str = "auto",
    timing: bool = False,
) -> Iterator[T]:
    """``enable`` for the duration of a ``with`` block."""
    enable(pipe, method, schedule=schedule, kernel=kernel, timing=timing)
    try:
        yield pipe
    finally:
        disable(pipe)


def report(pipe: Any) -> Report:
    """What the method did in the last run. Raises ``NotEnabledError`` when not attached."""
    return _session(_enabled(pipe)).report()


def branches(pipe: Any) -> nn.ModuleDict:
    """What the method has learned and an optimizer trains: by the number of the model, then of the layer.

    They are made by ``enable``, float32 as a rule, and ``disable`` forgets them: save them before. Gradients need eager
    mode. Raises ``NotEnabledError`` when not attached, ``BranchError`` for a method that learns nothing.
    """
    attachments = _enabled(pipe)
    session = _session(attachments)
    if not session.method.learns:
        raise BranchError(f"{session.method.name} has no parameters to train, as it is set: {session.method}")
    own = (session.trained.layers(attachment.number) for attachment in attachments)
    return nn.ModuleDict({str(number): modules for number, modules in enumerate(own)})


def save_branches(pipe: Any, path: str | Path) -> None:
    """Write what the method has learned to a safetensors file. Raises as ``branches``, and ``OSError``."""
    modules, method = branches(pipe), _session(_enabled(pipe)).method
    branch_file.save(path, modules, branch_file.label_of(method, identities(pipe)), method)


def load_branches(pipe: Any, path: str | Path) -> None:
    """Read what ``save_branches`` wrote, or the projections of an SLA checkpoint, into the method at work.

    Raises as ``branches``, ``BranchError`` for a file that is not of this model and method, and ``OSError``.
    """
    modules, method = branches(pipe), _session(_enabled(pipe)).method
    branch_file.load(path, modules, branch_file.label_of(method, identities(pipe)))


def check_recipe(pipe: Any, recipe: Recipe) -> None:
    """Raise ``RecipeError`` unless a recipe is for the transformers of a pipeline."""
    for model, layers in identities(pipe):
        recipe.check(model, layers)


def identities(pipe: Any) -> list[tuple[str, int]]:
    """Class name and number of self-attention layers of each transformer: what a recipe is for."""
    return [(class_name(model), len(host_for(model).attention_paths(model))) for model in _models(pipe)]


def attention(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    plan: Plan,
    *,
    scale: float | None = None,
    key_valid: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention over a plan's pairs, [B, H, Nq, D]; ``falloff.kernels.run`` also returns the LSE."""
    return kernels.attend(plan, q_BHND, k_BHND, v_BHND, scale=scale, key_valid=key_valid, impl=impl)


def _models(pipe: Any) -> list[nn.Module]:
    """The transformers meant; the original of a compiled one."""
    if isinstance(pipe, nn.Module):
        found = [pipe]
    elif isinstance(pipe, list | tuple):
        found = list(pipe)
    elif _is_pipeline(pipe):
        found = [model for name in TRANSFORMERS if (model := getattr(pipe, name, None)) is not None]
    else:
        raise UnsupportedModelError(f"expected a diffusers pipeline or transformers, got {type(pipe).__name__}")
    if not found:
        raise UnsupportedModelError(
            f"{type(pipe).__name__} has no transformer to attach to: falloff looks for {' and '.join(TRANSFORMERS)}, "
            f"and this pipeline has {', '.join(_parts(pipe)) or 'nothing'}"
        )
    return [getattr(model, "_orig_mod", model) for model in found]


def _check_frames(method: Method, hosts: list[Host]) -> None:
    for host in hosts:
        if method.needs_frames and not host.frames:
            others = ", ".join(name for name, other in methods.METHODS.items() if not other.needs_frames)
            raise ValueError(
                f"{method.name} leaves out pairs of frames, and {host.family} makes images, which have none; "
                f"methods for images: {others}"
            )


def _parts(pipe: Any) -> list[str]:
    """Names of what a pipeline is made of."""
    return [name for name, part in getattr(pipe, "components", {}).items() if part is not None]


def _is_pipeline(pipe: Any) -> bool:
    return hasattr(pipe, "components") and not isinstance(pipe, nn.Module)


def _attachments(models: list[nn.Module]) -> list[Attachment]:
    return [attachment for model in models if (attachment := getattr(model, "_falloff", None)) is not None]


def _enabled(pipe: Any) -> list[Attachment]:
    attachments = _attachments(_models(pipe))
    if not attachments:
        raise NotEnabledError(f"falloff is not enabled on this {type(pipe).__name__}; call falloff.enable first")
    return attachments


def _session(attachments: list[Attachment]) -> Session:
    if len({id(attachment.session) for attachment in attachments}) > 1:
        raise ValueError("these transformers were enabled one by one; ask for each")
    return attachments[0].session


def _check_kernel(kernel: str) -> None:
    known = [name for name, _, _ in kernels.available()]
    if kernel not in ("auto", *known):
        raise ValueError(f"unknown kernel {kernel!r}; choose auto or one of {', '.join(known)}")
