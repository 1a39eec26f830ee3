"""The classes that vLLM loads: each for its two interfaces, which share a registry and refuse each other's classes."""

from __future__ import annotations

import logging
from abc import abstractmethod
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import LogitsProcessor as V1LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2LogitsProcessor

from decoding.errors import DecodingError
from decoding.temperature.markers import Markers, markers_of
from decoding.tokens import ends_of_sequence
from decoding.vllm.budgets import BudgetSlots, budget_slots
from decoding.vllm.counts import counts_of_rank
from decoding.vllm.declaration import (
    TEMPERATURE_VARIABLE,
    DeclaredStyle,
    declared_phases,
    declared_selector,
    declared_styles,
    offered,
)
from decoding.vllm.plugin import refuse_other_backends
from decoding.vllm.requests import check_policy, check_request
from decoding.vllm.styles import LoadedStyles, load_styles
from decoding.vllm.temperatures import PromptTemperatures, load_temperatures
from decoding.vllm.tokenizer import engine_tokenizer
from decoding.vllm.v1 import BudgetRows, StyleRows, TemperatureRows, budget_rows
from decoding.vllm.v2 import PhaseSlots, StyleSlots, TemperatureSlots

logger = logging.getLogger(__name__)


class _Processor(V1LogitsProcessor, V2LogitsProcessor):
    """Hands a runner's calls on to what keeps its rows (V1) or its slots (V2).

    Args:
        vllm_config: the engine's.
        device_or_states: the device (V1), or the state of the requests (V2).
        is_pin_memory: V1's.
    """

    def __init__(self, vllm_config: VllmConfig, device_or_states: Any, is_pin_memory: bool = False):
        if not vllm_config.model_config.logits_processors:
            name = f"{type(self).__module__}:{type(self).__name__}"
            raise DecodingError(f"declare this processor with the engine: --logits-processors {name}")
        check_policy(SamplingParams())
        if vllm_config.diffusion_config is not None:
            raise DecodingError("a model that writes by diffusion is sampled in a way of its own, without processors")
        if isinstance(device_or_states, torch.device):
            self._rows = self._rows_of(vllm_config, device_or_states)
        else:
            self._slots = self._slots_of(vllm_config, device_or_states)

    @abstractmethod
    def _rows_of(self, vllm_config: VllmConfig, device: torch.device) -> StyleRows | TemperatureRows | BudgetRows: ...

    @abstractmethod
    def _slots_of(self, vllm_config: VllmConfig, states: Any) -> StyleSlots | TemperatureSlots | BudgetSlots: ...

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuses a request that asks for what this server does not have: HTTP 400 with the reason."""
        check_request(sampling_params)

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
        """Changes a step, in place: logits float32 [rows, W], and V2's layout of the batch."""
        return self._rows.apply(logits) if ctx is None else self._slots.apply(logits, ctx)


class StyleLogitsProcessor(_Processor):
    """Style priors per request, by ``extra_args={"style": …, "lambda": …}`` and guards (``vllm_xargs`` over HTTP).

    Declare it in ``logits_processors`` (`decoding.vllm.engine_args` and ``decoding serve`` do), not as an installed
    plugin: V1 keeps histories up to date for declared processors alone, and refuses those, rather than skipping them,
    under speculative decoding. V2 gives draft tokens their histories, and priors apply to them.
    """

    def is_argmax_invariant(self) -> bool:
        """No: greedy texts are steered too."""
        return False

    def _rows_of(self, vllm_config: VllmConfig, device: torch.device) -> StyleRows:
        return StyleRows(_styles_of(vllm_config, device), device, counts_of_rank(vllm_config.parallel_config))

    def _slots_of(self, vllm_config: VllmConfig, states: Any) -> StyleSlots:
        return StyleSlots(_styles_of(vllm_config, states.device), states, counts_of_rank(vllm_config.parallel_config))


class TemperatureLogitsProcessor(_Processor):
    """Temperatures that vLLM does not have, per request: chosen by the prompt, and different by phase.

    With ``extra_args={"temperature": "auto"}`` the selector chooses; with ``{"think_temperature": 1.0,
    "answer_temperature": 0.3}`` (a number or "auto", both or one of them) thinking and answering have one each.
    The request's own temperature is 1. It cannot be the chosen one: vLLM checks requests without their prompts, and has
    copied their temperatures before processors hear of them. So the logits are divided here, where vLLM would divide:
    after penalties and before top-k and top-p on both runners. Only min-p differs: V1 takes it first, at temperature 1.
    Where a temperature is chosen for a request that has no top-k, top-p or min-p, the selector's top-p follows.

    Declare it as the style processor. Draft tokens under V2 get the temperature of their request.
    """

    def is_argmax_invariant(self) -> bool:
        """Yes, which has V1 call it after penalties, and not at all for greedy batches."""
        return True

    def _rows_of(self, vllm_config: VllmConfig, device: torch.device) -> TemperatureRows:
        choose, markers = _temperatures_of(vllm_config, device)
        return TemperatureRows(choose, device, markers)

    def _slots_of(self, vllm_config: VllmConfig, states: Any) -> TemperatureSlots:
        choose, markers = _temperatures_of(vllm_config, states.device)
        drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", None) or 0
        return TemperatureSlots(choose, states, None if markers is None else PhaseSlots(markers, states, drafts))


class ChunkLogitsProcessor(_Processor):
    """Leaves logits as they are, and tells chunk selection which row wants which budget.

    That is ``extra_args={"kv_budget": …}``, a number of tokens, or "full" to opt out. An attention backend is told of
    rows (V1) or of places in the runner's table (V2), not of requests; processors are told of both, before it.
    """

    def is_argmax_invariant(self) -> bool:
        """Yes: it changes nothing."""
        return True

    def _rows_of(self, vllm_config: VllmConfig, device: torch.device) -> BudgetRows:
        refuse_other_backends(vllm_config)
        budgets = budget_rows(vllm_config.instance_id)
        budgets.longest = vllm_config.model_config.max_model_len
        return budgets

    def _slots_of(self, vllm_config: VllmConfig, states: Any) -> BudgetSlots:
        refuse_other_backends(vllm_config)
        budgets = budget_slots(vllm_config.instance_id, states.max_num_reqs)
        budgets.longest = vllm_config.model_config.max_model_len
        return budgets


def _styles_of(vllm_config: VllmConfig, device: torch.device) -> LoadedStyles:
    config, tokenizer = vllm_config.model_config, engine_tokenizer(vllm_config)
    stops = _stop_ids(config, tokenizer)
    return _loaded_styles(tuple(declared_styles().items()), tokenizer, config.get_vocab_size(), str(device), stops)


def _stop_ids(config: Any, tokenizer: Any | None) -> tuple[int, ...]:
    """The ids at which the engine ends a text by itself."""
    held = config.try_get_generation_config().get("eos_token_id")
    return () if tokenizer is None else tuple(ends_of_sequence(None, tokenizer, held))


@lru_cache(maxsize=1)
def _loaded_styles(
    declared: tuple[tuple[str, DeclaredStyle], ...],
    tokenizer: Any | None,
    width: int,
    device: str,
    stop_ids: tuple[int, ...],
) -> LoadedStyles:
    """The styles of a process, loaded once."""
    styles = load_styles(dict(declared), tokenizer, width, device, stop_ids)
    logger.info("loaded %d style priors: %s", len(declared), ", ".join(name for name, _ in declared))
    return styles


def _temperatures_of(vllm_config: VllmConfig, device: torch.device) -> tuple[PromptTemperatures | None, Markers | None]:
    """The selector and the markers of thinking, as declared."""
    if not offered().has_temperatures:
        raise DecodingError(f"no temperature selector and no phases are declared: {TEMPERATURE_VARIABLE} is not set")
    selector, phases = declared_selector(), declared_phases()
    config, tokenizer = vllm_config.model_config, engine_tokenizer(vllm_config)
    if phases is not None and tokenizer is None:
        raise DecodingError("markers of thinking are found with the model's tokenizer: do not skip its start")
    markers = None if phases is None else markers_of(tokenizer, *phases)
    if selector is None:
        return None, markers
    counts = counts_of_rank(vllm_config.parallel_config)
    return load_temperatures(selector, tokenizer, config.hf_text_config, str(device), counts), markers
