"""Hearing what a pipeline says to its transformer: a listener in diffusers' hook registry."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusers.hooks.hooks import BaseState, HookFunctionReference, HookRegistry, ModelHook, StateManager
from torch import nn

from falloff.hosts.where import Watch

KEY = "falloff"


class Ear(StateManager):  # type: ignore[misc]  # diffusers has no types
    """Keeps what ``cache_context`` says; diffusers' own manager keeps it under another name in every version."""

    said: Any | None = None

    def set_context(self, context: Any | None) -> None:
        super().set_context(context)
        self.said = context

    def reset(self, *args: Any, **kwargs: Any) -> None:
        super().reset(*args, **kwargs)
        self.said = None


class Listener(ModelHook):  # type: ignore[misc]  # diffusers has no types
    """Hears what the pipeline says through ``cache_context``, and that a pipeline call is over."""

    _is_stateful = True

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.ear = Ear(BaseState)
        self.watch = watch

    @property
    def context(self) -> Any | None:
        """With a ``name``; before diffusers 0.41 a pipeline says no more than that."""
        said = self.ear.said
        return SimpleNamespace(name=said) if isinstance(said, str) else said

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.watch.end_run()
        return module


def listen(model: nn.Module, listener: Listener) -> None:
    """Join the hook registry as its first hook, without a forward of our own.

    ``register_hook`` would replace the model's forward by a closure that a deep copy of the model shares with the
    original. The first place is the one that no other hook's removal refers to.
    """
    registry = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[KEY] = listener
    registry._hook_order.insert(0, KEY)
    registry._fn_refs.insert(0, HookFunctionReference())


def unlisten(model: nn.Module) -> None:
    registry = getattr(model, "_diffusers_hook", None)
    if registry is None or KEY not in registry.hooks:
        return
    place = registry._hook_order.index(KEY)
    del registry.hooks[KEY], registry._hook_order[place], registry._fn_refs[place]
