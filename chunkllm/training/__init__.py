"""How adapters come about: a frozen model reads, adapters learn from what it read, layers are calibrated."""

from chunkllm.training.lessons import ReadingOptions
from chunkllm.training.loop import Training, TrainingOptions

__all__ = ["ReadingOptions", "Training", "TrainingOptions"]
