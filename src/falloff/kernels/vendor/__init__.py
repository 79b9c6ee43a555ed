"""Kernels of others, none of them a requirement: found lazily, tried before their first use, taken by name.

Each file turns a plan into what one library reads, and says what that library cannot do.
"""

from falloff.kernels.vendor import cudnn, flash4, flashinfer, flex, sparge

VENDOR = (flex.KERNEL, cudnn.KERNEL, flash4.KERNEL, flashinfer.KERNEL, sparge.KERNEL)
"""To let ``auto`` take one, commit a measurement that shows it faster and drop its ``by_name``."""

__all__ = ["VENDOR"]
