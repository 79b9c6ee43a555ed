"""Methods that are made of other methods: how these are given, written down and asked."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor

from falloff.methods.base import Call, Dense, Method, State
from falloff.plan import Plan

Given = str | Method | dict[str, Any]
"""A method, its name for default settings, or {"name": ..., setting: value}."""


def method_of(given: Given) -> Method:
    """Raises ``ValueError`` for what names no method."""
    from falloff.methods import get  # which knows the methods that are made of others

    if isinstance(given, Method):
        return given
    if isinstance(given, str):
        return get(given)
    if isinstance(given, dict) and "name" in given:
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        return get(str(settings.pop("name")), **settings)
    raise ValueError(f'expected a method, its name or {{"name": ..., setting: value}}, got {given!r}')


def plain(method: Method) -> str | dict[str, Any]:
    """As plain values, which ``method_of`` reads back."""
    usual = type(method)().settings()
    changed = {name: value for name, value in method.settings().items() if value != usual[name]}
    return {"name": method.name, **changed} if changed else method.name


def ask(
    method: Method, key: Hashable, call: Call, tensors: tuple[Tensor, Tensor, Tensor], state: State
) -> Plan | Dense:
    """A method's answer, its state kept in ``state`` under a key; a static one's is made once for all calls."""
    if not method.static:
        own = state.values.setdefault(key, State(shared=state.shared))
        return method.plan(call, *tensors, own)
    device = tensors[0].device
    shared = (method, call.sequence, device)
    if shared not in state.shared:
        made = method.plan(call, *tensors, State())
        state.shared[shared] = made.to(device) if isinstance(made, Plan) else made
    answer: Plan | Dense = state.shared[shared]
    return answer
