"""Tuning a model to its sparse attention and to longer videos: LoRA, branches and backbones,
on folders of videos with captions."""

from falloff.training.adapter import loaded
from falloff.training.cache import Size
from falloff.training.errors import TrainingError
from falloff.training.loop import Course
from falloff.training.lora import Lora, train_lora
from falloff.training.sparse import Sparse, train_sparse

__all__ = ["Course", "Lora", "Size", "Sparse", "TrainingError", "loaded", "train_lora", "train_sparse"]
