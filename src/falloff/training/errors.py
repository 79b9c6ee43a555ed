"""What keeps a training from starting or going on, in words for the user."""

from __future__ import annotations


class TrainingError(ValueError):
    """Data, settings or a model that cannot be trained with, told before any training."""
