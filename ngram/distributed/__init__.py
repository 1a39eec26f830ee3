"""Training on disk: models whose n-grams outgrow memory, in tasks that many processes share."""

from ngram.distributed.training import Step, Training

__all__ = ["Step", "Training"]
