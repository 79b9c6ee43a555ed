"""What a method did in a run: one record a self-attention call, and the report made of them."""

from __future__ import annotations

from falloff.reporting.journal import Journal
from falloff.reporting.record import Record, Stopwatch
from falloff.reporting.report import Report

__all__ = ["Journal", "Record", "Report", "Stopwatch"]
