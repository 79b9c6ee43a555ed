"""Share out a budget: for each of many units one of some options, so that the loss over all is least."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HALVINGS = 60
"""Of the price's range: to the last digit of a float."""


def allocate(loss_UO: Floats, cost_UO: Floats, budget: float) -> Ints:
    """The option of every unit, int64 [U], whose mean cost is at most ``budget`` and mean loss near the least.

    Every unit takes the option of least ``loss + price cost`` at the lowest price whose choices fit the budget. No
    other choices of the same mean cost or less lose less; choices between two prices' are not tried. Where nothing
    fits, every unit takes its cheapest option.
    """
    least = cost_UO.min(1).mean()
    low, high = 0.0, 1.0
    if _mean(cost_UO, _at(loss_UO, cost_UO, 0.0)) <= budget:
        return _at(loss_UO, cost_UO, 0.0)
    if least > budget:
        return _at(cost_UO, loss_UO, 0.0)
    while _mean(cost_UO, _at(loss_UO, cost_UO, high)) > budget:
        low, high = high, 2 * high
    for _ in range(HALVINGS):
        price = (low + high) / 2
        fits = _mean(cost_UO, _at(loss_UO, cost_UO, price)) <= budget
        low, high = (low, price) if fits else (price, high)
    return _at(loss_UO, cost_UO, high)


def _at(loss_UO: Floats, cost_UO: Floats, price: float) -> Ints:
    """Choices at a price; of equal ones the cheaper."""
    total = loss_UO + price * cost_UO
    best = total <= total.min(1, keepdims=True)
    choice: Ints = np.where(best, cost_UO, np.inf).argmin(1)
    return choice


def _mean(values_UO: Floats, choice_U: Ints) -> float:
    return float(np.take_along_axis(values_UO, choice_U[:, None], 1).mean())
