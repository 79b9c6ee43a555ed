"""Block maps to measure: a static method's, with its published settings where there are some, or a random one."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from falloff.api import plan_for
from falloff.evaluation.bench.shapes import Shape
from falloff.methods import METHODS, Method
from falloff.methods.presets import PRESETS, preset
from falloff.plan import BlockMap, Plan

RANDOM = "random:"
RANDOM_BLOCK = 128


def method_of(name: str, shape: Shape, block: int | None = None) -> Method:
    """The method of a map's name: a preset, or a method with the preset of the shape's model or its defaults.

    Raises ``ValueError`` for another name, and for a block size that the method does not take.
    """
    if name in PRESETS:
        method = preset(name).method
    elif shape.preset is not None and preset(shape.preset).method.name == name:
        method = preset(shape.preset).method
    elif name in METHODS:
        method = METHODS[name]()
    else:
        known = ", ".join(sorted(METHODS))
        raise ValueError(
            f"unknown map {name!r}; choose one of {known}, a preset of 'falloff methods', or {RANDOM}DENSITY for "
            "attention alone"
        )
    if block is None:
        return method
    if "block" not in {field.name for field in dataclasses.fields(method)}:
        raise ValueError(f"{method.name} takes no block size; leave --block out")
    changed: dict[str, Any] = {"block": block}
    return dataclasses.replace(method, **changed)


def plan_of(name: str, shape: Shape, block: int | None = None, seed: int = 0) -> Plan:
    """The plan of a map on a shape. Raises ``ValueError`` for names, densities and shapes that do not go together."""
    if is_random(name):
        block = block or RANDOM_BLOCK
        return random_plan(shape, _density(name, shape, block), block, torch.Generator().manual_seed(seed))
    method = method_of(name, shape, block)
    if shape.sequence is None:
        raise ValueError(
            f"map {name!r} needs to know where tokens are; give the shape {shape.name!r} as "
            "HEADS,DIM,FRAMESxHEIGHTxWIDTH, or take a random map"
        )
    return plan_for(method, shape.sequence)


def random_plan(shape: Shape, density: float, block: int, generator: torch.Generator) -> Plan:
    """A map for each head: its diagonal, and blocks beside it drawn so that ``density`` of the pairs is expected."""
    blocks = -(-shape.tokens // block)
    beside_diagonal = (density * blocks - 1) / max(1, blocks - 1)
    chosen = torch.rand((shape.heads, blocks, blocks), generator=generator) < beside_diagonal
    chosen |= torch.eye(blocks, dtype=torch.bool)
    return Plan(
        q_len=shape.tokens, kv_len=shape.tokens, q_sizes=block, kv_sizes=block, blocks=BlockMap.from_dense(chosen)
    )


def is_random(name: str) -> bool:
    return name.startswith(RANDOM)


def check(name: str, shape: Shape, block: int | None = None) -> None:
    """Raise what ``plan_of`` would, without drawing a random map."""
    if is_random(name):
        _density(name, shape, block or RANDOM_BLOCK)
    else:
        plan_of(name, shape, block)


def _density(name: str, shape: Shape, block: int) -> float:
    text = name.removeprefix(RANDOM)
    try:
        density = float(text)
    except ValueError:
        raise ValueError(f"the density of {name!r} must be a number, such as {RANDOM}0.2") from None
    diagonal = 1 / -(-shape.tokens // block)
    if not diagonal <= density <= 1:
        raise ValueError(
            f"density {density} of a random map is outside {diagonal:.3g} (its diagonal alone, for "
            f"{shape.tokens} tokens in blocks of {block}) to 1"
        )
    return density
