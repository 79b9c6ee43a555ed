"""Faster diffusion video and image generation, with its price in quality shown."""

from falloff.api import attention, disable, enable, report, using
from falloff.geometry import Grid, Sequence
from falloff.methods import Full, Method, Radial
from falloff.plan import BlockMap, Plan
from falloff.schedule import Schedule
from falloff.session import Report

__all__ = [
    "BlockMap",
    "Full",
    "Grid",
    "Method",
    "Plan",
    "Radial",
    "Report",
    "Schedule",
    "Sequence",
    "attention",
    "disable",
    "enable",
    "report",
    "using",
]
