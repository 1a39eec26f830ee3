"""The class that vLLM loads: one for its two interfaces, which share a registry and refuse each other's classes."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from decoding.errors import DecodingError
from decoding.vllm.requests import PROCESSOR, LoadedStyles, declared_styles, load_styles, requested_styles
from decoding.vllm.v1 import Rows
from decoding.vllm.v2 import Slots

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _loaded(declared: tuple[tuple[str, str], ...], tokenizer: Any | None, width: int, device: str) -> LoadedStyles:
    """The styles of a process, loaded once."""
    styles = load_styles(dict(declared), tokenizer, width, device)
    logger.info("loaded %d style priors: %s", len(declared), ", ".join(name for name, _ in declared))
    return styles


def _styles_of(vllm_config: VllmConfig, device: torch.device) -> LoadedStyles:
    config = vllm_config.model_config
    tokenizer = cached_tokenizer_from_config(config)
    return _loaded(tuple(declared_styles().items()), tokenizer, config.get_vocab_size(), str(device))


class StyleLogitsProcessor(V1LogitsProcessor, V2LogitsProcessor):
    """Style priors per request, by ``extra_args={"style": …, "lambda": …}`` (``vllm_xargs`` over HTTP).

    Declare it in ``logits_processors`` (`decoding.vllm.style_engine_args` and ``decoding serve`` do), not as an
    installed plugin: V1 keeps histories up to date for declared processors alone, and refuses those, rather than
    skipping them, under speculative decoding. V2 gives draft tokens their histories, and priors apply to them.

    Args:
        vllm_config: the engine's.
        device_or_states: the device (V1), or the state of the requests (V2).
        is_pin_memory: V1's.
    """

    def __init__(self, vllm_config: VllmConfig, device_or_states: Any, is_pin_memory: bool = False):
        if not vllm_config.model_config.logits_processors:
            raise DecodingError(f"declare the style processor with the engine: --logits-processors {PROCESSOR}")
        if isinstance(device_or_states, torch.device):
            self._rows = Rows(_styles_of(vllm_config, device_or_states), device_or_states)
        else:
            self._slots = Slots(_styles_of(vllm_config, device_or_states.device), device_or_states)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request that names an unknown style, or λ or lists that are off: HTTP 400 with the reason."""
        requested_styles(sampling_params.extra_args, declared_styles())

    def is_argmax_invariant(self) -> bool:
        """No: greedy texts are steered too."""
        return False

    def update_state(self, batch_update: Any | None) -> None:
        """V1: requests joined, left or moved."""
        self._rows.update(batch_update)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """V2: a request takes a slot."""
        return self._slots.add(req_idx, sampling_params)

    def apply_staged_writes(self) -> None:
        """V2: before each step."""
        self._slots.flush()

    def apply(self, logits: Tensor, ctx: Any | None = None) -> Tensor:
        """Steers a step, in place: logits float32 [rows, W], and V2's layout of the batch."""
        return self._rows.apply(logits) if ctx is None else self._slots.apply(logits, ctx)
