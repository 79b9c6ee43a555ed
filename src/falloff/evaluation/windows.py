"""Which window of sliding tiles suits a head: measured in dense runs (arXiv:2502.04507, section 3.3).

At one step of every stage of a run each window's output is compared with full attention's, head by head, on sampled
queries; the full output is passed on, so that errors do not add up. Errors are means over prompts and branches of
guidance. Where the paper takes the least error whatever it costs, a budget decides here, which all heads share.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from falloff.evaluation.allocate import Floats, allocate
from falloff.geometry import Sequence
from falloff.methods.base import Call, State
from falloff.methods.routing import output_errors, sampled_queries
from falloff.methods.sta import SlidingTile
from falloff.methods.sta_windows import LETTERS, TileWindows
from falloff.plan import Plan

WINDOWS = ((1, 1, 1), (1, 3, 3), (3, 1, 1), (3, 3, 3), (5, 3, 3), (3, 5, 5), (5, 5, 5), (1, 99, 99), (99, 1, 1))
"""What heads choose from: near in time, in space, in both; whole frames, and one place in all of them."""
STAGES = 3
"""Of a run, with windows of their own."""


@dataclass(frozen=True, kw_only=True)
class WindowObserver:
    """Notes the error of windows, for a ``Probe`` of as many steps as there are stages.

    method: the tile and the windows. queries: drawn a call, from the grid's tokens. seed: of the draw.
    errors: of (stage, layer) the error of every window in every head [H, W], energy of the difference over that of
        full attention's output, call by call. densities: of every window's plan; plans: all of them.
    """

    method: TileWindows
    queries: int = 256
    seed: int = 0
    errors: dict[tuple[int, int], list[Floats]] = field(
        default_factory=lambda: defaultdict(list), init=False, compare=False, repr=False
    )
    densities: list[float] = field(default_factory=list, init=False, compare=False, repr=False)
    plans: dict[tuple[Sequence, torch.device], tuple[Plan, ...]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def see(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> None:
        plans = self._plans_for(call.sequence, q_BHND.device)
        rows = sampled_queries(call.sequence, self.queries, self.seed).to(q_BHND.device)
        errors = output_errors(plans, call.sequence, q_BHND, k_BHND, v_BHND, rows)
        stage = self.method.stage(call.step, call.steps)
        self.errors[stage, call.layer].append(errors.mean(1).T.double().cpu().numpy())
        self.densities[:] = [plan.density for plan in plans]

    def found(self, budget: float) -> TileWindows:
        """The windows of least error whose plans' mean density is at most ``budget``."""
        units = [(unit, np.mean(self.errors[unit], 0)) for unit in sorted(self.errors)]
        loss = np.concatenate([errors for _, errors in units])
        choice = allocate(loss, np.broadcast_to(self.densities, loss.shape), budget)
        per_head = iter(choice.tolist())
        rows = {unit: "".join(LETTERS[next(per_head)] for _ in errors) for unit, errors in units}
        layers = 1 + max(layer for _, layer in rows)
        stages = range(len(self.method.until))
        heads = tuple(tuple(rows[stage, layer] for layer in range(layers)) for stage in stages)
        return replace(self.method, heads=heads)

    def evidence(self) -> list[dict[str, object]]:
        """Of every window its density, and its mean error in every layer, over heads and stages."""
        layers = sorted({layer for _, layer in self.errors})
        by_layer = {
            layer: np.concatenate([e for (_, own), found in self.errors.items() if own == layer for e in found]).mean(0)
            for layer in layers
        }
        return [
            {
                "window": list(window),
                "density": round(density, 4),
                "error_by_layer": [round(float(by_layer[layer][number]), 4) for layer in layers],
            }
            for number, (window, density) in enumerate(zip(self.method.windows, self.densities, strict=True))
        ]

    def _plans_for(self, sequence: Sequence, device: torch.device) -> tuple[Plan, ...]:
        if (sequence, device) not in self.plans:
            tile, nothing = self.method.tile_of(sequence.grid), torch.empty(0)
            tiles = [SlidingTile(tile=tile, window=window) for window in self.method.windows]
            call = Call(sequence=sequence)
            self.plans[sequence, device] = tuple(
                each.plan(call, nothing, nothing, nothing, State()).to(device) for each in tiles
            )
        return self.plans[sequence, device]


def to_search(method: SlidingTile, stages: int = STAGES) -> TileWindows:
    """The windows to search with a method's tile, its own window first."""
    windows = dict.fromkeys((method.window, *WINDOWS))
    until = tuple((stage + 1) / stages for stage in range(stages))
    return TileWindows(tile=method.tile, windows=tuple(windows), until=until)
