"""Temperatures as logits processors: a fixed one, one by the entropy of each token, one chosen for each prompt.

All of them divide scores by a temperature for each row. Leave ``temperature`` of ``generate`` at 1, its default:
transformers divides by it afterwards.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from decoding import metrics
from decoding.errors import DecodingError
from decoding.late import LateAnswer
from decoding.temperature.abilities import size_class
from decoding.temperature.prompts import PromptFrame
from decoding.temperature.selector import Policy, TemperatureSelector

_LEAST = 1e-2  # Temperatures below it differ from greedy search by rounding alone.


class Temperature(LogitsProcessor):
    """Divides every row of scores by that row's temperature."""

    @abstractmethod
    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The temperatures of a step.

        Args:
            input_ids: tokens so far, int64 [B, L].
            scores: float [B, V], before softmax.

        Returns:
            float [B] or [1], all above 0.
        """

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``scores`` divided by the temperatures: a new tensor like it."""
        return scores / self.of(input_ids, scores).to(scores.dtype)[:, None]


class FixedTemperature(Temperature):
    """The same temperature for all.

    Raises:
        DecodingError: not a positive, finite number.
    """

    def __init__(self, temperature: float):
        self.temperature = checked_temperature(temperature)

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        return scores.new_full((1,), self.temperature)


class EntropyDependentTemperature(Temperature):
    """EDT (arXiv 2403.14541): T = T₀ · 0.8^(θ / H), H being the entropy of the distribution at temperature 1, in nats.

    Confident tokens get a temperature near 0, uncertain ones come near T₀. The paper tunes T₀ and θ on each task.

    Args:
        temperature: T₀.
        theta: θ; 0 leaves T₀ fixed.

    Raises:
        DecodingError: T₀ not positive, or θ negative.
    """

    def __init__(self, temperature: float = 1.0, theta: float = 1.0):
        self.temperature = checked_temperature(temperature)
        self.theta = _at_least_0("theta", theta)

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        factor = 0.8 ** (self.theta / metrics.entropy(scores).clamp(min=1e-6))
        return (self.temperature * factor).clamp(min=min(_LEAST, self.temperature))


class DynamicTemperature(Temperature):
    """llama.cpp's dynamic temperature: from T − range at no entropy to T + range at the largest.

    T = (T − r) + 2r · (H / log n)^exponent, H being the entropy at temperature 1 and n the number of tokens that are
    not ruled out.

    Args:
        temperature: T, the middle.
        range: r.
        exponent: how entropy maps to the range.

    Raises:
        DecodingError: T not positive, or r or the exponent negative.
    """

    def __init__(self, temperature: float = 1.0, range: float = 0.5, exponent: float = 1.0):
        self.temperature = checked_temperature(temperature)
        self.range = _at_least_0("range", range)
        self.exponent = _at_least_0("exponent", exponent)

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        allowed = (~torch.isneginf(scores)).sum(-1)
        share = metrics.entropy(scores) / allowed.clamp(min=2).log()
        low = max(self.temperature - self.range, 0.0)
        spread = self.temperature + self.range - low
        return (low + spread * share.clamp(0, 1) ** self.exponent).clamp(min=_LEAST)


class AutoTemperature(Temperature):
    """A temperature for each row, chosen once from its prompt.

    Examples:
        >>> generate("path-or-hub-id", prompt, logits_processor=[AutoTemperature()])
        >>> auto = AutoTemperature(TemperatureSelector.from_pretrained(), tokenizer)
        >>> model.generate(**inputs, do_sample=True, logits_processor=[auto])

    An instance can be used again, and notices other prompts by itself. On CUDA, where no step waits for the device,
    prompts that continue the last call's texts by exactly one token, in form only, are noticed one step late.

    Args:
        selector: the embedded one by default, opened by `bind`.
        tokenizer: the generating model's. `decoding.generate` binds it; ``model.generate`` needs it here.
        model_size: "small", "medium" or "large"; by default by the bound model's parameters, or "small".
        policy: "ability" or "curve"; by default "curve" where the selector has one of the bound model.

    Attributes:
        chosen: the temperatures of the rows of the last call, float32 [B], or None.

    Raises:
        DecodingError: when called without a tokenizer, or with an empty prompt.
    """

    def __init__(
        self,
        selector: TemperatureSelector | None = None,
        tokenizer: Any | None = None,
        *,
        model_size: str | None = None,
        policy: Policy | None = None,
    ):
        self.selector = selector
        self.model_size = model_size
        self.policy = policy
        self._asked = (model_size, policy)  # of which `bind` makes what fits the model
        self.chosen: Tensor | None = None
        self._frame: PromptFrame | None = None
        self._prompt: Tensor | None = None  # the rows that `chosen` was chosen for
        self._length = 0  # of the rows at the last step
        self._differs = LateAnswer()
        if tokenizer is not None:
            self.bind(tokenizer)

    def bind(self, tokenizer: Any, model: Any | None = None) -> AutoTemperature:
        """Readies it for a tokenizer and, if given, its model. Returns itself.

        Raises:
            DecodingError: policy "curve" was asked for, and the selector's curve is of another model.
        """
        self.selector = self.selector or TemperatureSelector.from_pretrained()
        self._frame = PromptFrame(tokenizer)
        self._prompt = None
        if model is not None:
            size, policy = self._asked
            is_for = self.selector.is_for(model)
            if policy == "curve" and not is_for:
                raise DecodingError("the selector has no curve of this model: train one, or leave policy out")
            self.model_size = size or size_class(model.num_parameters())
            self.policy = policy or ("curve" if is_for else "ability")
        return self

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        if self.chosen is None or not self._goes_on(input_ids):
            self.chosen = self._choose(input_ids).to(scores.device)
            self._prompt = input_ids.clone()
        self._length = input_ids.shape[1]
        return self.chosen

    def _goes_on(self, input_ids: Tensor) -> bool:
        """Whether the rows are those of the last step, with more tokens."""
        prompt = self._prompt
        if prompt is None or len(input_ids) != len(prompt) or input_ids.shape[1] < prompt.shape[1]:
            return False

        def differs() -> Tensor:
            return (input_ids[:, : prompt.shape[1]] != prompt).any()

        if input_ids.shape[1] == self._length + 1:
            return not self._differs(input_ids.device, differs)
        return not bool(differs())

    def _choose(self, input_ids: Tensor) -> Tensor:
        if self._frame is None or self.selector is None:
            raise DecodingError(
                "this AutoTemperature has no tokenizer: write AutoTemperature(selector, tokenizer), "
                "or use decoding.generate, which binds it"
            )
        prompts = [self._frame.text_of(ids) for ids in input_ids.tolist()]
        different = list(dict.fromkeys(prompts))  # beams and several answers share a prompt
        found = self.selector.temperatures(different, self.model_size or "small", self.policy)
        return found[torch.tensor([different.index(prompt) for prompt in prompts], device=found.device)]


def checked_temperature(value: float, name: str = "temperature") -> float:
    """A temperature as a float.

    Raises:
        DecodingError: not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise DecodingError(f"{name} must be a positive number, not {value!r}; for greedy search, do_sample=False")
    return float(value)


def _at_least_0(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise DecodingError(f"{name} must be a number of at least 0, not {value!r}")
    return float(value)
