"""Kernels of others, none of them a requirement: found lazily, tried before their first use, taken by name.

Each file turns a plan into what one library reads, and says what that library cannot do.
"""

from falloff.kernels.vendor import flex

VENDOR = (flex.KERNEL,)
"""To let ``auto`` take one, commit a measurement that shows it faster and drop its ``by_name``."""

__all__ = ["VENDOR"]
