"""The seam with diffusers: how attention calls of a transformer reach a session, and how the model is left again.

Each self-attention processor is marked with a backend key of our own, so that diffusers' dispatcher hands its
calls to ``_route`` after the model's own projections, norms and rotary embedding. Nothing is patched or wrapped: the
key is in no enum map, no forward is replaced, cross-attention and other models are not touched. Forward hooks of
PyTorch tell the layer and the grid; a listener in diffusers' hook registry hears ``cache_context``.
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from torch import Tensor, nn

from falloff.geometry import Grid
from falloff.hosts import Host, UnsupportedModelError, op, parallel, processors
from falloff.hosts.layers import layer_of
from falloff.hosts.listener import Listener, listen, unlisten
from falloff.hosts.where import Watch
from falloff.session import DenseBackend, Seat, Session

NAME = "falloff"


class DetachedError(RuntimeError):
    """A later call of the user took layers away from falloff."""


def _backend_key() -> Any:
    """A member of the enum's type that is not in the enum: the dispatcher takes it, nobody else sees it.

    Unless the user wants it there, see ``backend.register_diffusers_backend``.
    """
    key = str.__new__(AttentionBackendName, NAME)
    key._name_, key._value_ = NAME.upper(), NAME
    key.__deepcopy__ = lambda memo: key  # enums of Python 3.10 would look the copy up by value
    return key


KEY = _backend_key()


class _Here(threading.local):
    """The layer whose forward runs in this thread (``slot``, ``None`` between layers).

    ``hidden``: the layer's input, where a method reads it. Both are there from a thread's start: a compiler that
    traced their absence would find them in the frame it has just made.
    """

    def __init__(self) -> None:
        self.slot: op.Slot | None = None
        self.hidden: Tensor | None = None


_here = _Here()


def _route(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any | None = None,
) -> Tensor:
    """Attention of a marked processor, [B, S, H, D]. A compiler traces this function, so it decides nothing.

    A call of no marked layer comes here when the user has chosen falloff by its name: it stays dense.
    """
    slot = _here.slot
    if slot is None:
        out: Tensor = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask,
            dropout_p,
            is_causal,
            scale,
            enable_gqa,
            backend=AttentionBackendName.NATIVE,
            parallel_config=_parallel_config,
        )
        return out
    if dropout_p or is_causal or enable_gqa:
        raise NotImplementedError("falloff serves plain self-attention: no dropout, causal mask or grouped queries")
    mask = attn_mask[:, :, :1] if attn_mask is not None and slot.scene.square_mask else attn_mask
    if _parallel_config is None:
        return op.attend(query, key, value, mask, slot, scale, _here.hidden)
    config = _parallel_config.context_parallel_config
    query, key, value = (parallel.all_tokens(x, config) for x in (query, key, value))
    mask = parallel.whole_mask(mask, config)
    return parallel.own_tokens(op.attend(query, key, value, mask, slot, scale), config)


def _register() -> None:
    """Diffusers 0.35 knows no context parallelism, and its registry no word for it."""
    known = inspect.signature(_AttentionBackendRegistry.register).parameters
    more = {"supports_context_parallel": True} if "supports_context_parallel" in known else {}
    _AttentionBackendRegistry.register(KEY, **more)(_route)


_register()


@dataclass(kw_only=True)
class Mark:
    """One marked layer, and what it was before."""

    path: str
    attn: Any
    slot: op.Slot
    processor: Any
    before: Any
    """The processor it had: the same one, or the one it shared with other layers."""
    key: Any
    had_key: bool
    handles: list[Any]

    @property
    def holds(self) -> bool:
        return self.attn.processor is self.processor and self.processor._attention_backend is KEY


class Attachment:
    """A session at work in one transformer. Kept by the transformer itself, as ``_falloff``."""

    def __init__(self, session: Session, watch: Watch, host: Host, model: nn.Module, number: int) -> None:
        self.session = session
        self.watch = watch
        self.model = model
        self.number = number
        self.marks: list[Mark] = []
        self.handles: list[Any] = []
        self.listener = Listener(watch)
        self.host = host
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]
        """Of the forward's arguments, in their order."""
        self.scene = op.Scene(host.square_mask)
        self.stays_dense: str | None = None
        """Why all forwards do, if they do for a while."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """A copied model is attached like the first, to a session of its own."""
        twin = Attachment.__new__(Attachment)
        memo[id(self)] = twin
        for name, value in vars(self).items():
            setattr(twin, name, copy.deepcopy(value, memo))
        for mark in twin.marks:
            mark.slot = op.Slot(twin.session, mark.slot.seat, mark.slot.dense, twin.scene)
            mark.attn._falloff_slot = mark.slot
        return twin

    def arrive(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model's forward starts with these arguments."""
        lost = [mark.path for mark in self.marks if not mark.holds]
        if lost:
            raise DetachedError(
                f"{len(lost)} of {len(self.marks)} self-attention layers no longer run through falloff (first: "
                f"{lost[0]}): set_attention_backend or set_attn_processor was called after enable. Call "
                "falloff.enable(..., replace=True) to attach again, with the new backend for dense calls, or "
                "falloff.disable(...)"
            )
        _check_config(self.model, self.host)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        grid = self.host.grid(given, self.model.config)
        reason = grid if isinstance(grid, str) else self.stays_dense
        count, share = parallel.shares(_parallelism(self.model, self.host, self.marks[0].processor))
        self.scene.set(None if isinstance(grid, str) else Grid(*grid), count)
        if count > 1 and self.session.trained.read_hidden(self.number):
            raise UnsupportedModelError(
                f"{self.session.method.name} as it is set reads the layers' hidden states, of which a process has its "
                "own tokens alone under context parallelism; run it without"
            )
        position = self.watch.look(self.listener.context, given["timestep"])
        self.session.begin(position, given["hidden_states"].device, reason, share=share)


def attach(models: Sequence[nn.Module], hosts: Sequence[Host], session: Session, pipe: Any | None) -> None:
    """Mark the self-attention of all models; of none when one of them cannot be marked."""
    watch = Watch(pipe, hosts[0].branches if pipe is not None else ())
    attachments = []
    try:
        for number, (model, host) in enumerate(zip(models, hosts, strict=True)):
            attachments.append(Attachment(session, watch, host, model, number))
            _attach(attachments[-1])
    except BaseException:
        for attachment in attachments:
            detach(attachment)
        raise


def attached(model: nn.Module) -> Attachment | None:
    """The attachment of a model, if it has one."""
    return getattr(model, "_falloff", None)


def detach(attachment: Attachment) -> None:
    """Leave the model as it was. Layers that the user has changed since stay as the user wants them."""
    model = attachment.model
    for mark in attachment.marks:
        _unmark(mark)
    for handle in attachment.handles:
        handle.remove()
    unlisten(model)
    if attached(model) is attachment:
        del model._falloff


def _attach(attachment: Attachment) -> None:
    model, host = attachment.model, attachment.host
    _check_config(model, host)
    paths = host.attention_paths(model)
    if not paths:
        raise UnsupportedModelError(
            f"no module of this {type(model).__name__} matches {', '.join(host.self_attention)}, where the family "
            f"{host.family} has its self-attention; correct self_attention of its host"
        )
    _check_arguments(model, attachment.names)
    users = Counter(id(module.processor) for module in model.modules() if hasattr(module, "processor"))
    model._falloff = attachment  # type: ignore[assignment]  # modules say tensors or modules
    for layer, path in enumerate(paths):
        attn = model.get_submodule(path)
        _check_processor(path, attn)
        _parallelism(model, host, attn.processor)
        seat = Seat(model=attachment.number, layer=layer, layers=len(paths), text_side=host.text_side)
        attachment.marks.append(_mark(path, attn, seat, attachment, shared=users[id(attn.processor)] > 1))
        _learn(attachment, attachment.marks[-1])
    attachment.handles.append(model.register_forward_pre_hook(_root_starts, with_kwargs=True))
    attachment.handles.append(model.register_forward_hook(_root_ends))
    attachment.handles.append(model.register_forward_hook(_root_left, always_call=True))
    listen(model, attachment.listener)


def _learn(attachment: Attachment, mark: Mark) -> None:
    """Give a layer its parameters, where the method has some."""
    session, seat = attachment.session, mark.slot.seat
    if session.learns(seat.layer):
        shape, device = layer_of(mark.path, mark.attn)
        branch = session.trained.add(session.method, seat.model, seat.layer, shape, device)
        if branch.reads_hidden:
            mark.handles.append(mark.attn.register_forward_pre_hook(_layer_shows, with_kwargs=True))


def _check_arguments(model: nn.Module, names: list[str]) -> None:
    missing = [name for name in ("hidden_states", "timestep") if name not in names]
    if missing:
        raise UnsupportedModelError(
            f"the forward of {type(model).__name__} takes {', '.join(names)}, but not {' and '.join(missing)}, from "
            "which falloff tells the device and the step"
        )


def _check_config(model: nn.Module, host: Host) -> None:
    reason = host.refuse(model.config)
    if reason is not None:
        raise UnsupportedModelError(f"falloff cannot serve this {type(model).__name__}: {reason}")


def _parallelism(model: nn.Module, host: Host, processor: Any) -> Any | None:
    """The context parallelism of a model. Raises ``UnsupportedModelError`` for one that cannot be served."""
    config = parallel.config_of(model, processor)
    if config is None:
        return None
    dispatched = type(processor) not in processors.SUBSTITUTES and not isinstance(processor, processors.OURS)
    reason = parallel.fault(config, dispatched=dispatched, square_mask=host.square_mask)
    if reason is not None:
        raise UnsupportedModelError(
            f"falloff cannot serve this {type(model).__name__} under context parallelism: {reason}"
        )
    return config


def _check_processor(path: str, attn: Any) -> None:
    if not hasattr(attn, "processor"):
        raise UnsupportedModelError(
            f"{path} is a {type(attn).__name__} without a processor, so that falloff cannot reach its attention; call "
            "falloff.enable on the model as it was loaded"
        )
    processor = attn.processor
    if type(processor) not in processors.SUBSTITUTES and not hasattr(processor, "_attention_backend"):
        raise UnsupportedModelError(
            f"{path} has the processor {type(processor).__name__}, which does not go through diffusers' attention "
            "dispatcher; falloff.enable needs the model's own processors, and for some models a newer diffusers"
        )


def _mark(path: str, attn: Any, seat: Seat, attachment: Attachment, *, shared: bool) -> Mark:
    before = attn.processor
    processor = _ours(before, shared=shared)
    key = processor._attention_backend
    dense = _dense_backend(key, per_sample=hasattr(processor, "drops_padding"))
    slot = op.Slot(attachment.session, seat, dense, attachment.scene)
    had_key = "_attention_backend" in vars(before)
    attn._falloff_slot = slot
    if processor is not before:
        _set_processor(attn, processor)
    processor._attention_backend = KEY
    handles = [
        attn.register_forward_pre_hook(_layer_starts),
        attn.register_forward_hook(_layer_ends),
    ]
    return Mark(
        path=path, attn=attn, slot=slot, processor=processor, before=before, key=key, had_key=had_key, handles=handles
    )


def _ours(before: Any, *, shared: bool) -> Any:
    """The processor to mark: the one there is, unless it cannot be reached or the mark would reach other layers."""
    substitute = processors.SUBSTITUTES.get(type(before))
    if substitute is not None:
        return substitute()
    return copy.copy(before) if shared else before


def _set_processor(attn: Any, processor: Any) -> None:
    if hasattr(attn, "set_processor"):
        attn.set_processor(processor)
    else:  # Mochi's attention
        attn.processor = processor


def _unmark(mark: Mark) -> None:
    substituted = type(mark.before) in processors.SUBSTITUTES and mark.attn.processor is mark.processor
    if substituted or (mark.holds and mark.before is not mark.processor):
        _set_processor(mark.attn, mark.before)
    elif mark.holds and mark.had_key:
        mark.processor._attention_backend = mark.key
    elif mark.holds:
        del mark.processor._attention_backend
    for handle in mark.handles:
        handle.remove()
    del mark.attn._falloff_slot


def _dense_backend(key: Any | None, *, per_sample: bool) -> DenseBackend:
    """The backend that a processor named, or the global one of the moment when it named none; never falloff itself."""

    def backend() -> Any:
        chosen = key if key is not None else _AttentionBackendRegistry._active_backend
        return AttentionBackendName.NATIVE if chosen is KEY else chosen

    def name() -> str:
        return str.__str__(backend())  # a member of the enum is a string itself; the enum's own way is ten times slower

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
        if per_sample:
            return processors.per_sample(q, k, v, mask, scale, backend())
        chosen = backend()
        out: Tensor
        if chosen is AttentionBackendName.NATIVE and not _AttentionBackendRegistry._checks_enabled:
            # what the dispatcher would call, without its sorting of arguments
            out = _AttentionBackendRegistry._backends[chosen](q, k, v, attn_mask=mask, scale=scale)
        else:
            out = dispatch_attention_fn(q, k, v, attn_mask=mask, scale=scale, backend=chosen)
        return out

    return DenseBackend(name=name, run=run)


# PyTorch runs the hooks of a compiled model outside its graph, but would compile each of them by itself. Inside an
# outer compiled function they break the graph, so such a function cannot be compiled with fullgraph=True.
@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch left it untyped
def _root_starts(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    model._falloff.arrive(args, kwargs)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch left it untyped
def _root_ends(model: Any, args: tuple[Any, ...], output: Any) -> None:
    model._falloff.session.end()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # PyTorch left it untyped
def _root_left(model: Any, args: tuple[Any, ...], output: Any) -> None:
    """Also on an error in a layer, which must not be taken for the layer of other calls."""
    _here.slot = _here.hidden = None


def _layer_starts(attn: Any, args: tuple[Any, ...]) -> None:
    _here.slot = attn._falloff_slot


def _layer_shows(attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    _here.hidden = args[0] if args else kwargs["hidden_states"]


def _layer_ends(attn: Any, args: tuple[Any, ...], output: Any) -> None:
    _here.slot = _here.hidden = None
