"""Tuning a model to its sparse attention and to longer videos: LoRA on folders of videos with captions."""

from falloff.training.cache import Size
from falloff.training.errors import TrainingError
from falloff.training.loop import Course
from falloff.training.lora import Lora, train_lora

__all__ = ["Course", "Lora", "Size", "TrainingError", "train_lora"]
