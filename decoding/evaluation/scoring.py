"""Log-probabilities of given tokens under a policy: what its processors do in steps, along a text that is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from decoding.style.bound import BoundStyle
from decoding.temperature.processors import BoundTemperature, Temperature


class Scoring:
    """A policy's processors along texts, for one call: temperatures that they chose for a context are kept.

    Args:
        processors: those of `Policy.processors`, in their order.
    """

    def __init__(self, processors: Sequence[Any]):
        self._processors = list(processors)
        self._of_context: dict[tuple[int, ...], Temperature] = {}

    @property
    def reads_contexts(self) -> bool:
        """Whether scores depend on where the context ends, and not on the tokens alone."""
        return any(isinstance(each, BoundTemperature) for each in self._processors)

    def log_probs(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """The distributions that the last tokens of a text would be sampled from.

        Args:
            tokens: the text without its last token, int64 [L]: a context, and all but the last of what follows it.
            scores: the model's, float32 [N, V], of what follows each of the last N tokens.

        Returns:
            float32 [N, V].
        """
        for processor in self._processors:
            if isinstance(processor, BoundStyle):
                scores = processor.along(tokens, scores)
            else:
                scores = scores / self._temperatures(processor, tokens, scores)[:, None]
        return scores.log_softmax(-1)

    def _temperatures(self, processor: Temperature, tokens: Tensor, scores: Tensor) -> Tensor:
        """Of each step, float [N]."""
        first = len(tokens) - len(scores) + 1
        context = tuple(tokens[:first].tolist())
        if isinstance(processor, BoundTemperature):
            processor = self._of_context.setdefault(context, processor.again())
        steps = (processor.of(tokens[None, : first + at], scores[at : at + 1]) for at in range(len(scores)))
        return torch.cat(list(steps)).to(scores.dtype)
