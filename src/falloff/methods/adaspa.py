"""AdaSpa (arXiv:2502.21079): blocks chosen by their exact mass, at a few steps of a run, and kept in between.

At a search step the mass of every pair of blocks is added up exactly,

    W_IJ = sum_{i in I, j in J} exp(q_i . k_j / sqrt(D) - lse_i),

and every row of blocks keeps its heaviest (paper, section 4). Heads that need fewer give to heads that need more.
Maps and the LSE hardly change from step to step, so that plans serve until the next search, which takes the LSE of the
first. Text is always computed, and is in no sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from falloff.kernels.groups import groups_within
from falloff.kernels.product import product
from falloff.methods.base import Call, Choices, Dense, Method, Span, State
from falloff.methods.layout import NOT_FINITE, UniformBlocks, uniform_plan
from falloff.methods.select import topk
from falloff.plan import Plan
from falloff.schedule import Schedule, count

SEARCH_BYTES = 256 << 20
"""Scores held at once during a search; smaller means more and smaller products."""
SCORE_BYTES = 12
"""Of one score: itself, itself less the LSE, and its weight."""

SELECTION_BYTES = 32
"""Of one pair of blocks while the heaviest are found: its mass, sorted, and where it was."""


@dataclass(frozen=True, kw_only=True)
class AdaSpa(Method):
    """AdaSpa over any grid, images included, with text on either side.

    sparsity: share of the blocks of a row that is left out. Legal: 0 to less than 1.
    block: tokens a block.
    recall: heads that keep more than this share of their mass are made sparser, as many others denser. 1: none are.
    search_every: steps from one search to the next, or their share of all steps when a float.
    """

    name: ClassVar[str] = "adaspa"
    dial: ClassVar[str | None] = "sparsity"
    knobs: ClassVar[Mapping[str, Span | Choices]] = {
        "sparsity": Span(0.3, 0.95),
        "block": Choices((32, 64, 128)),
        "recall": Span(0.5, 1.0),
        "search_every": Choices((0.2, 0.4, 1.0)),
    }
    schedule: ClassVar[Schedule] = Schedule(dense_first=0.2, dense_layers=())

    sparsity: float = 0.8
    block: int = 64
    recall: float = 0.8
    search_every: int | float = 0.4

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity < 1.0:
            raise ValueError(f"sparsity = {self.sparsity} is outside 0.0 to 1.0, where 1.0 would leave nothing")
        if not 0.0 <= self.recall <= 1.0:
            raise ValueError(f"recall = {self.recall} is outside 0.0 to 1.0")
        if not isinstance(self.block, int) or self.block < 1:
            raise ValueError(f"block = {self.block!r} must be a number of tokens of at least 1")
        check_every("search_every", self.search_every)

    @torch.no_grad()
    def plan(self, call: Call, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, state: State) -> Plan | Dense:
        """The layer's last plan until a search is due; without a known step, that of the first call."""
        shape = (call.sequence, q_BHND.shape, q_BHND.device)
        kept = state.values if state.values.get("shape") == shape else {}
        if kept and not due(call, kept["step"], self.search_every):
            plan: Plan = kept["plan"]
            return plan
        blocks = UniformBlocks(call.sequence, self.block)
        q, k = (x[:, :, blocks.tokens] for x in (q_BHND, k_BHND))
        mass, lse = block_mass(q, k, self.block, kept.get("lse"))
        if not bool(lse.isfinite().all() & mass.isfinite().all()):
            return NOT_FINITE
        plan = uniform_plan(blocks, blocks, self._select(mass))
        state.values = {"shape": shape, "step": call.step, "lse": lse, "plan": plan}
        return plan

    def _select(self, mass_BHTT: Tensor) -> Tensor:
        """Which pairs of blocks are computed: equally many in every row of a head, bool [B, H, T, T]."""
        batch, heads, blocks = mass_BHTT.shape[:3]
        on = torch.empty(mass_BHTT.shape, dtype=torch.bool, device=mass_BHTT.device)
        if not blocks:
            return on
        groups = list(groups_within(batch, heads, SELECTION_BYTES * blocks**2))
        recall = torch.empty(batch, heads, dtype=mass_BHTT.dtype, device=mass_BHTT.device)
        for group in groups:
            usual = topk(mass_BHTT[group], max(1, round((1 - self.sparsity) * blocks)))
            recall[group] = (mass_BHTT[group] * usual).sum((1, 2)) / mass_BHTT[group].sum((1, 2))
        sparsity = head_sparsity(recall, self.sparsity, self.recall)
        budget = ((1 - sparsity) * blocks).round().long().clamp(min=1)
        for group in groups:
            on[group] = topk(mass_BHTT[group], budget[group][:, None, None])
        return on


def due(call: Call, before: int | None, every: int | float) -> bool:
    """Whether ``every`` steps, or that share of all steps, have passed since step ``before``, where that is known."""
    if call.step is None or before is None:
        return False
    if isinstance(every, float) and call.steps is None:
        return False
    return call.step >= before + max(1, count(every, call.steps or 0))


def check_every(field: str, every: int | float) -> None:
    """Raise ``ValueError`` unless it is a number of steps or a share of them."""
    if isinstance(every, bool) or every <= 0 or (isinstance(every, float) and every > 1.0):
        raise ValueError(f"{field} = {every!r} must be at least 1 step, or a share of them above 0.0 to 1.0")


def head_sparsity(recall_BH: Tensor, sparsity: float, enough: float) -> Tensor:
    """The sparsity of every head, [B, H]: that many of the best heads (1 + s) / 2 and of the worst (3 s - 1) / 2.

    As many each as there are heads with a recall above ``enough``, half of all at most: the mean stays s. Below
    s = 1/3 both change by s only.
    """
    heads = recall_BH.shape[1]
    moved = (recall_BH > enough).sum(1, keepdim=True).clamp(max=heads // 2)
    rank = recall_BH.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    best, worst = rank < moved, rank >= heads - moved
    change = min((1 - sparsity) / 2, sparsity)  # a head cannot be denser than dense
    return sparsity + change * (best.to(recall_BH.dtype) - worst.to(recall_BH.dtype))


def block_mass(q_BHND: Tensor, k_BHND: Tensor, block: int, lse_BHN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """W of the module's docstring [B, H, T, T] and the LSE of every query [B, H, N], float32 at least.

    With an LSE of before, mass is relative to that one, which saves a pass over the scores. Never more than
    ``SEARCH_BYTES`` of scores at once, unless one row of blocks takes more.
    """
    batch, heads, length, head_dim = q_BHND.shape
    exact = torch.promote_types(q_BHND.dtype, torch.float32)
    count = -(-length // block)
    mass = torch.empty(batch, heads, count, count, dtype=exact, device=q_BHND.device)
    lse = torch.empty(batch, heads, length, dtype=exact, device=q_BHND.device) if lse_BHN is None else lse_BHN
    row_bytes = SCORE_BYTES * block * count * block
    together = max(1, min(count, SEARCH_BYTES // row_bytes)) if count else 1
    for group in groups_within(batch, heads, max(1, together * row_bytes), SEARCH_BYTES):
        q, k = (F.pad(x[group], (0, 0, 0, count * block - length)) for x in (q_BHND, k_BHND))
        for first in range(0, count, together):
            rows = slice(first * block, min((first + together) * block, length))
            scores = product(q[:, rows], k.mT).mul_(head_dim**-0.5)
            scores[..., length:] = -torch.inf
            if lse_BHN is None:
                lse[group][:, rows] = scores.logsumexp(-1)
            weights = scores.sub_(lse[group][:, rows, None]).exp_()
            by_key_block = weights.view(*weights.shape[:2], count, block).sum(-1)
            by_key_block = F.pad(by_key_block, (0, 0, 0, -by_key_block.shape[1] % block))
            mass[group][:, first : first + together] = by_key_block.view(len(q), -1, block, count).sum(2)
    return mass, lse
