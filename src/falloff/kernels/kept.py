"""What kernels derive from a plan, made once and kept as long as the plan lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from falloff.plan import Plan

T = TypeVar("T")

_kept: WeakKeyDictionary[Plan, dict[Hashable, Any]] = WeakKeyDictionary()


def kept(plan: Plan, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` gives for ``key``; made at the first call."""
    made = _kept.setdefault(plan, {})
    if key not in made:
        made[key] = make()
    value: T = made[key]
    return value
