"""How long a measurement will take, told before it starts."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from falloff.evaluation.bench.timing import Arm, once
from falloff.evaluation.figures import seconds

PROBE_TOKENS = {"cpu": 1024, "cuda": 8192}
WORTH_A_WORD = 60
"""Seconds from which a user is told what to expect."""


def in_words(flops: float, *, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """``", about ..."`` for so many operations, judged by a small attention call; empty when soon over."""
    tokens = PROBE_TOKENS[device.type]
    q = torch.randn(1, heads, tokens, head_dim, device=device).to(dtype)
    probe = Arm(lambda: F.scaled_dot_product_attention(q, q, q))
    for _ in range(2):  # the first warms up
        (taken,) = once(probe, device)
    expected = flops / (4 * heads * tokens**2 * head_dim) * taken
    return f", about {seconds(expected)}" if expected > WORTH_A_WORD else ""
