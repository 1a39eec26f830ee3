"""Temperatures as logits processors: a fixed one, one by the entropy of each token, one chosen for each prompt.

All of them divide scores by a temperature for each row. Leave ``temperature`` of ``generate`` at 1, its default:
transformers divides by it afterwards.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from decoding import metrics
from decoding.errors import DecodingError
from decoding.late import LateAnswer
from decoding.temperature.abilities import size_class
from decoding.temperature.explained import Explained
from decoding.temperature.markers import Markers, markers_of
from decoding.temperature.prompts import PromptFrame
from decoding.temperature.selector import Policy, TemperatureSelector, read_texts

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


class BoundTemperature(Temperature):
    """Temperatures for one tokenizer and one call of ``generate``: chosen at its first step, and kept to its last.

    `AutoTemperature.bound` makes it.

    Args:
        selector: chooses.
        frame: takes the user's text out of token ids.
        model_size: as for `TemperatureSelector.select`; None is "small".
        policy: likewise.
        thinking: the temperature of thinking, and its markers; None where the chosen one is for all.

    Attributes:
        chosen: the temperatures of the call's rows, float32 [B], or None before its first step.
    """

    def __init__(
        self,
        selector: TemperatureSelector,
        frame: PromptFrame,
        model_size: str | None = None,
        policy: Policy | None = None,
        thinking: tuple[float, Markers] | None = None,
    ):
        self.selector = selector
        self.frame = frame
        self.model_size = model_size
        self.policy = policy
        self.thinking = thinking
        self.chosen: Tensor | None = None
        self._texts: list[str] = []  # of the rows, and what the encoder made of them
        self._vectors: Tensor | None = None

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        if self.chosen is None or len(self.chosen) != len(input_ids):
            self._texts = [self.frame.text_of(ids) for ids in input_ids.tolist()]
            self._vectors = read_texts(self.selector, self._texts)
            found = self.selector.temperatures_of(self._vectors, self.model_size or "small", self.policy)
            self.chosen = found.to(scores.device)
        if self.thinking is None:
            return self.chosen
        think, markers = self.thinking
        return torch.where(markers.thinking(input_ids), think, self.chosen)

    def explained(self) -> list[Explained]:
        """Why the call's rows have their temperatures, from what was read for them; none before its first step."""
        if self._vectors is None:
            return []
        return self.selector.explain_read(self._texts, self._vectors, self.model_size or "small", self.policy)

    def again(self) -> BoundTemperature:
        """The same for another call."""
        return BoundTemperature(self.selector, self.frame, self.model_size, self.policy, self.thinking)


class AutoTemperature(Temperature):
    """A temperature for each row, chosen once from its prompt. A prompt without text gets that for prompts of any kind.

    Examples:
        >>> generate("path-or-hub-id", prompt, logits_processor=[AutoTemperature()])
        >>> auto = AutoTemperature(TemperatureSelector.from_pretrained(), tokenizer, model=model)
        >>> model.generate(**inputs, do_sample=True, top_k=0, top_p=auto.top_p, logits_processor=[auto])

    An instance can be used again. `decoding.generate` has it made for the call, as `bound` does. ``model.generate``
    does not say when a call begins: rows that are not those of the step before with one token more are taken for
    another call's, and chosen for anew. So a call whose prompts are the last one's with all that it wrote, as in going
    on writing, keeps the temperatures; and in assisted generation, whose rows also get shorter, prompts without a chat
    template are read with what is written of the answer. ``logits_processor=[auto.bound(tokenizer, model)]``, made for
    each call, does neither. On CUDA, where no step waits for the device, other prompts that are one token longer than
    the rows of the last step are noticed one step late.

    The selector's scores were sampled with a top-p, which `decoding.generate` samples with unless it is given another
    truncation. ``model.generate`` has to be told: ``top_p=auto.top_p``.

    Args:
        selector: the embedded one by default, opened by `bind` or when something of it is asked for.
        tokenizer: the generating model's. `decoding.generate` binds it; ``model.generate`` needs it here.
        model: the generating model, likewise.
        model_size: "small", "medium" or "large"; by default by the model's parameters. Without either it is "small",
            and a warning says so.
        policy: "ability" or "curve"; by default "curve" where the selector has one of the bound model.
        think: the temperature of thinking, as for `PhaseTemperature`; the chosen one is then the answer's.

    Attributes:
        chosen: the temperatures of the rows of the last call, float32 [B], or None.

    Raises:
        DecodingError: when called without a tokenizer; or with ``think``, and a tokenizer that has no markers of
            thinking.
    """

    def __init__(
        self,
        selector: TemperatureSelector | None = None,
        tokenizer: Any | None = None,
        *,
        model: Any | None = None,
        model_size: str | None = None,
        policy: Policy | None = None,
        think: float | None = None,
    ):
        self.think = None if think is None else checked_temperature(think, "think")
        self.selector = selector
        self._asked = (model_size, policy)  # of which `bound` makes what fits the model
        self._bound: BoundTemperature | None = None
        self._last: BoundTemperature | None = None  # that of the last call, whose it may be
        self._prompt: Tensor | None = None  # the rows that the temperatures were chosen for
        self._length = 0  # of the rows at the last step
        self._differs = LateAnswer()
        if tokenizer is not None:
            self.bind(tokenizer, model)

    @property
    def chosen(self) -> Tensor | None:  # noqa: D102
        return None if self._last is None else self._last.chosen

    @property
    def top_p(self) -> float | None:
        """The selector's top-p: what its temperatures go with. None where it is not known."""
        return self._opened().top_p

    @property
    def model_size(self) -> str | None:
        """As given, or of the model of the last call."""
        return self._asked[0] if self._last is None else self._last.model_size

    @property
    def policy(self) -> Policy | None:
        """As given, or for the model of the last call."""
        return self._asked[1] if self._last is None else self._last.policy

    def bind(self, tokenizer: Any, model: Any | None = None) -> AutoTemperature:
        """Readies it for a tokenizer and, if given, its model. Returns itself.

        Raises:
            DecodingError: policy "curve" was asked for, and the selector's curve is of another model.
        """
        self._bound, self._prompt = self.bound(tokenizer, model), None
        return self

    def bound(self, tokenizer: Any, model: Any | None = None) -> BoundTemperature:
        """As `bind`, for one call: whatever this is bound to stays so.

        Raises:
            DecodingError: as `bind`.
        """
        selector = self._opened()
        size, policy = self._asked
        if model is not None:
            is_for = selector.is_for(model)
            if policy == "curve" and not is_for:
                raise DecodingError("the selector has no curve of this model: train one, or leave policy out")
            size = size or size_class(model.num_parameters())
            policy = policy or ("curve" if is_for else "ability")
        thinking = None if self.think is None else (self.think, markers_of(tokenizer))
        made = BoundTemperature(selector, PromptFrame(tokenizer), size, policy, thinking)
        self._last, self._bound = made, self._bound or made  # Another thread may bind it at the same time.
        return made

    def _opened(self) -> TemperatureSelector:
        self.selector = self.selector or TemperatureSelector.from_pretrained()
        return self.selector

    def of(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: D102
        if self._bound is None:
            raise DecodingError(
                "this AutoTemperature has no tokenizer: write AutoTemperature(selector, tokenizer, model=model), "
                "or use decoding.generate, which binds it"
            )
        if not self._goes_on(input_ids):
            self._warn_of_size()
            self._bound = self._last = self._bound.again()
            self._prompt, self._differs = input_ids.clone(), LateAnswer()
        self._length = input_ids.shape[1]
        return self._bound.of(input_ids, scores)

    def _goes_on(self, input_ids: Tensor) -> bool:
        """Whether the rows are those of the last step, with a token more."""
        prompt = self._prompt
        if prompt is None or len(input_ids) != len(prompt) or input_ids.shape[1] != self._length + 1:
            return False
        return not self._differs(input_ids.device, lambda: (input_ids[:, : prompt.shape[1]] != prompt).any())

    def _warn_of_size(self) -> None:
        bound = self._bound
        if bound is not None and bound.model_size is None and bound.policy != "curve":
            bound.model_size = "small"
            warnings.warn(
                'the generating model\'s size is unknown, and taken for "small" (below 5e9 parameters): '
                "write AutoTemperature(selector, tokenizer, model=model), or give model_size",
                stacklevel=2,
            )


def checked_temperature(
    value: float, name: str = "temperature", hint: str = "; for greedy search, do_sample=False"
) -> float:
    """A temperature as a float.

    Raises:
        DecodingError: not a positive, finite number.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise DecodingError(f"{name} must be a positive number, not {value!r}{hint}")
    return float(value)


def _at_least_0(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise DecodingError(f"{name} must be a number of at least 0, not {value!r}")
    return float(value)
