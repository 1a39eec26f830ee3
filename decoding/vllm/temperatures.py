"""The temperatures that the selector chooses for prompts of token ids. Knows nothing of vLLM's runners."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from chunkllm.late import Arriving
from decoding.errors import DecodingError
from decoding.models import without_weights
from decoding.temperature.abilities import size_class
from decoding.temperature.prompts import PromptFrame
from decoding.temperature.selector import Policy, TemperatureSelector, read_texts
from decoding.vllm.counts import NOWHERE, Counting
from decoding.vllm.declaration import DeclaredSelector
from decoding.vllm.metrics import KINDS, TEMPERATURE

logger = logging.getLogger(__name__)
_requests = logging.getLogger(f"vllm.{__name__}")  # below vLLM's, whose handler and VLLM_LOGGING_LEVEL it has
_REMEMBERED = 4096


class _Choice(NamedTuple):
    temperature: Tensor  # a float32 scalar
    kind: Tensor  # int64, an index of `KINDS`


class PromptTemperatures:
    """Chooses the temperatures of prompts, and remembers them: a prompt is read once, however often it comes.

    No prompt raises an error, which would end the engine and other requests with it. One that has no text, is given as
    embeddings, or cannot be read gets the temperature for prompts of unknown kind.

    Args:
        selector: reads the prompts, on its device.
        frame: takes the text out of token ids.
        model_size: as for `TemperatureSelector.select`.
        policy: likewise.
        remembered: how many prompts.
        counts: where it counts what it chooses, for each request.

    Attributes:
        top_p: the selector's; None where not known.

    Raises:
        DecodingError: an unknown size or policy, or a selector without a curve.
    """

    def __init__(
        self,
        selector: TemperatureSelector,
        frame: PromptFrame,
        model_size: str,
        policy: Policy | None = None,
        remembered: int = _REMEMBERED,
        counts: Counting = NOWHERE,
    ):
        self._selector = selector
        self._frame = frame
        self._settings = (model_size, policy)
        self._remembered = remembered
        self._chosen: OrderedDict[bytes, _Choice] = OrderedDict()
        self._counts = counts
        self._untold: list[Arriving] = []
        self.top_p = selector.top_p
        (self._unknown,) = self._choices([""])

    def __call__(self, prompts: Sequence[Sequence[int] | None]) -> list[Tensor]:
        """The temperature of each prompt: float32 scalars on the selector's device.

        Args:
            prompts: token ids; None for one of embeddings. Those that are not remembered are read in one batch.
        """
        keys = [_key(prompt) for prompt in prompts]
        new = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in self._chosen}
        self._chosen.update(zip(new, self._read(list(new.values())), strict=True))
        for key in keys:
            self._chosen.move_to_end(key)
        chosen = [self._chosen[key] for key in keys]
        while len(self._chosen) > self._remembered:
            self._chosen.popitem(last=False)
        temperatures = [each.temperature for each in chosen]
        if chosen and (self._counts or _requests.isEnabledFor(logging.DEBUG)):
            kinds = torch.stack([each.kind for each in chosen])
            self._untold.append(Arriving(torch.stack((torch.stack(temperatures), kinds.float()))))
            if not kinds.is_cuda:
                self.tell()
        return temperatures

    def tell(self) -> None:
        """Logs and counts what was chosen since the last call. On a device that has arrived a step later."""
        arrived = [pair for each in self._untold for pair in each.get().T.tolist()]
        self._untold.clear()
        for temperature, kind in arrived:
            value, name = round(temperature, 4), KINDS[int(kind)]
            _requests.debug("temperature %g for a request of kind %s", value, name)
            self._counts.add(TEMPERATURE, value, name)

    def _choices(self, texts: Sequence[str]) -> list[_Choice]:
        vectors = read_texts(self._selector, texts)
        temperatures = self._selector.temperatures_of(vectors, *self._settings)
        return [_Choice(*both) for both in zip(temperatures, self._selector.kinds_of(vectors), strict=True)]

    def _read(self, prompts: Sequence[Sequence[int] | None]) -> list[_Choice]:
        try:
            return self._choices([self._text_of(prompt) for prompt in prompts]) if prompts else []
        except Exception:  # Whatever it is: see above.
            logger.exception("the temperature selector failed; %d prompts count as of unknown kind", len(prompts))
            return [self._unknown] * len(prompts)

    def _text_of(self, prompt: Sequence[int] | None) -> str:
        # V2 writes zeros where a prompt of embeddings has no ids.
        return self._frame.text_of(prompt) if prompt and any(prompt) else ""


def _key(prompt: Sequence[int] | None) -> bytes:
    return blake2b(np.asarray(prompt or (), np.int64).tobytes(), digest_size=16).digest()


def load_temperatures(
    declared: DeclaredSelector, tokenizer: Any, config: Any, device: str, counts: Counting = NOWHERE
) -> PromptTemperatures:
    """Opens a declared selector, once in a process.

    Args:
        declared: the selector.
        tokenizer: the model's.
        config: transformers' configuration of the model, for its size if none is declared.
        device: where prompts are read.
        counts: where it counts what it chooses.

    Raises:
        DecodingError: no tokenizer, a selector that is missing or damaged, or settings that it does not have.
    """
    if tokenizer is None:
        raise DecodingError("the temperature selector reads prompts with the model's tokenizer: do not skip its start")
    size = declared.model_size or model_size_of(config)
    selector = _opened(declared.selector, device)
    temperatures = PromptTemperatures(selector, PromptFrame(tokenizer), size, declared.policy, counts=counts)
    logger.info("loaded a temperature selector: %s, for a %s model", declared.selector or "the embedded one", size)
    return temperatures


@lru_cache(maxsize=1)
def _opened(source: str | None, device: str) -> TemperatureSelector:
    return TemperatureSelector.from_pretrained(source, device=device)


def model_size_of(config: Any) -> str:
    """The size class of a model by its parameters, quantized or not; "small" if transformers does not know the model.

    Builds the model without its weights.
    """
    try:
        model = without_weights(config)
    except Exception as error:  # Models raise what they like.
        logger.warning('unknown number of parameters (%s): the temperature selector takes "small"', error)
        return "small"
    return size_class(model.num_parameters())
