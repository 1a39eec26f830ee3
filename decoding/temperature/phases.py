"""One temperature while a model thinks, another while it answers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from decoding.errors import DecodingError
from decoding.temperature.markers import Markers, markers_of
from decoding.temperature.processors import Temperature, checked_temperature


class PhaseTemperature(Temperature):
    """A temperature for thinking, and one for answering, for models that reason before they answer.

    A row is thinking from a marker that begins it, be it the prompt's, until one that ends it is written: the first
    token behind ``</think>`` has the answer's temperature. The last marker decides, so that what earlier turns thought
    does not count. It is looked for in the whole row at every step: an instance keeps nothing of a call, and rows may
    be reordered, padded on the left, and offered again.

    Examples:
        >>> generate("path-or-hub-id", prompt, chat=True, logits_processor=[PhaseTemperature(think=1.0, answer=0.3)])
        >>> phases = PhaseTemperature(0.6, 0.2, tokenizer, begin="<reasoning>", end="</reasoning>")
        >>> model.generate(**inputs, do_sample=True, logits_processor=[phases])

    Args:
        think: the temperature of thinking.
        answer: that of all else.
        tokenizer: the generating model's. `decoding.generate` binds it; ``model.generate`` needs it here.
        begin: the text that begins thinking; by default the model's own, as `markers_of` finds it.
        end: the text that ends it.

    Raises:
        DecodingError: a temperature that is none; begin without end; no markers given, and none in the tokenizer; or
            when called without a tokenizer.
    """

    def __init__(
        self,
        think: float = 1.0,
        answer: float = 0.3,
        tokenizer: Any | None = None,
        begin: str | None = None,
        end: str | None = None,
    ):
        self.think = checked_temperature(think, "think")
        self.answer = checked_temperature(answer, "answer")
        self.begin, self.end = begin, end
        self._markers: Markers | None = None
        if tokenizer is not None:
            self.bind(tokenizer)

    def bind(self, tokenizer: Any, model: Any | None = None) -> PhaseTemperature:
        """Readies it for a tokenizer. Returns itself.

        Raises:
            DecodingError: no markers given, and none in the tokenizer; or texts that it cannot spell.
        """
        self._markers = markers_of(tokenizer, self.begin, self.end)
        return self

    def bound(self, tokenizer: Any, model: Any | None = None) -> PhaseTemperature:
        """As `bind`, for one call: another one, and what this is bound to stays so."""
        other = PhaseTemperature(self.think, self.answer, tokenizer, self.begin, self.end)
        self._markers = self._markers or other._markers
        return other

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        if self._markers is None:
            raise DecodingError(
                "this PhaseTemperature has no tokenizer: write PhaseTemperature(think, answer, tokenizer), "
                "or use decoding.generate, which binds it"
            )
        return torch.where(self._markers.thinking(input_ids), self.think, self.answer)
