"""When attention stays dense: the first and last steps of a run, and chosen layers."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which steps and layers stay dense.

    ``dense_first`` and ``dense_last`` count steps when they are ints, and are a share of all steps (rounded to
    the nearest step) when they are floats. ``dense_layers`` are layer indices, 0 the first, or a float: the share of
    all layers, from the first, that stays dense. By default one of forty does, as in Radial Attention's Wan 2.1.
    """

    dense_first: int | float = 0.25
    dense_last: int | float = 0
    dense_layers: tuple[int, ...] | float = 0.025

    def __post_init__(self) -> None:
        for field in ("dense_first", "dense_last"):
            _check_amount(field, getattr(self, field))
        if isinstance(self.dense_layers, float):
            _check_share("dense_layers", self.dense_layers, "all layers; name layers by a tuple of their indices")
            return
        object.__setattr__(self, "dense_layers", tuple(self.dense_layers))
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in self.dense_layers):
            raise ValueError(f"dense_layers must be layer indices of at least 0, got {self.dense_layers}")

    def dense_of(self, layers: int | None) -> tuple[int, ...]:
        """The dense layers of a model of so many; of an unknown number a share is the first layer."""
        if not isinstance(self.dense_layers, float):
            return self.dense_layers
        if layers is None:
            return (0,) if self.dense_layers else ()
        return tuple(range(count(self.dense_layers, layers)))

    def named(self, layers: int | None) -> Schedule:
        """The same schedule for a model of so many layers, those that stay dense by their indices."""
        return replace(self, dense_layers=self.dense_of(layers))

    def reason(self, *, layer: int, step: int | None, steps: int | None) -> str | None:
        """Why this call stays dense, or ``None`` when a method may plan it.

        A share of an unknown number of steps cannot be told, so such a call stays dense; so does one whose
        step is unknown while any step is to stay dense.
        """
        if layer in self.dense_of(None):
            return "dense layer"
        if not self.dense_first and not self.dense_last:
            return None
        if step is None or steps is None:
            return "step unknown"
        return self.step_reason(step, steps)

    def step_reason(self, step: int, steps: int) -> str | None:
        """Why all layers stay dense in a step of ``steps``, or ``None``."""
        if step < count(self.dense_first, steps):
            return "dense first step"
        if step >= steps - count(self.dense_last, steps):
            return "dense last step"
        return None

    def sparse_later(self, *, layer: int, step: int | None, steps: int | None) -> bool:
        """Whether this layer is in the run's dense first steps, with steps after them that are not dense."""
        if layer in self.dense_of(None) or step is None or steps is None:
            return False
        return step < count(self.dense_first, steps) < steps - count(self.dense_last, steps)


def count(amount: int | float, steps: int) -> int:
    """A number of steps, from a number or a share of all ``steps``."""
    return amount if isinstance(amount, int) else round(amount * steps)


def _check_amount(field: str, amount: int | float) -> None:
    if isinstance(amount, bool) or not isinstance(amount, int | float):
        raise TypeError(f"{field} must be a number of steps or a share of them, got {amount!r}")
    if isinstance(amount, float):
        _check_share(field, amount, "all steps; use an int to count steps")
    if amount < 0:
        raise ValueError(f"{field} = {amount} is negative; use 0 or more steps")


def _check_share(field: str, share: float, whole: str) -> None:
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"{field} = {share} is outside 0.0 to 1.0, the shares of {whole}")
