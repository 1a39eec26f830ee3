"""The lossless mode: a selection drafts, full attention verifies, and the text is the model's own.

Speculative decoding (Leviathan et al., arXiv 2211.17192) in which the model drafts for itself, with fewer keys and
values. Tokens are chosen with random numbers that belong to places of the text (`Noise`), so that a drafted token is
either right or wrong, and what is written is what ``generate`` writes without, sampled or not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation import GenerateDecoderOnlyOutput, GenerationMode

from chunkllm.contiguous.plan import Counters, Plan
from chunkllm.contiguous.texts import Texts
from chunkllm.contiguous.verified import VerifiedCache
from chunkllm.errors import ChunkError
from chunkllm.late import Stopwatch
from chunkllm.models import CACHE_NAMES, layer_kinds
from chunkllm.pace import MOST_DRAFTED, Pace

_HELD = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "input_ids", *CACHE_NAMES}
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)


def lossless(generate: Callable[..., Any], counters: Counters) -> Callable[..., Any]:
    """A model's ``generate``, losslessly.

    Args:
        generate: of a model with a selection attached.
        counters: where it is counted what was drafted.
    """

    @wraps(generate)
    def written(*args: Any, **options: Any) -> Any:
        given = inspect.signature(generate).bind_partial(*args, **options).arguments
        options = given | given.pop("kwargs", {})
        if options.get("custom_generate") is not None:
            raise ChunkError("verify=True writes by a custom_generate of its own: leave yours out, or verify")
        call = _Call(counters, options.get("streamer"), options.get("assistant_model"))
        return generate(*given.pop("args", ()), **_with_stop_strings(options) | {"custom_generate": call.write})

    return written


def require_verifiable(model: Any, plan: Plan) -> None:
    """Refuses a model that cannot go back to where a draft began.

    Raises:
        ChunkError: it does not generate, or has layers whose states take everything in.
    """
    kind = plan.shape.model_type
    if not hasattr(model, "generate"):
        raise ChunkError(f"verify=True works in generate, which {type(model).__name__} does not have")
    if others := sorted(set(layer_kinds(plan.config).others)):
        raise ChunkError(
            f"{kind} has layers that cannot forget what was drafted ({', '.join(others)}): leave verify=True out"
        )


def _with_stop_strings(options: dict[str, Any]) -> dict[str, Any]:
    """``stop_strings`` as a criterion: with a ``custom_generate``, transformers loses the tokenizer that it needs."""
    config, tokenizer = deepcopy(options.get("generation_config")), options.get("tokenizer")
    strings = options.get("stop_strings") or getattr(config, "stop_strings", None)
    if strings is None or tokenizer is None:
        return options
    criteria = [*(options.get("stopping_criteria") or ()), StopStringCriteria(tokenizer, strings)]
    if config is not None:
        config.stop_strings = None
    said = {"stop_strings": None, "generation_config": config, "stopping_criteria": StoppingCriteriaList(criteria)}
    return options | said


@dataclass(frozen=True)
class _Call:
    """What transformers does not hand to a ``custom_generate``."""

    counters: Counters
    streamer: Any | None
    assistant_model: Any | None

    def write(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Any:
        """See ``GenerationMixin._sample``, whose place it takes."""
        _require(generation_config, self.assistant_model, logits_processor)
        texts = Texts(input_ids, logits_processor, stopping_criteria, generation_config, self.streamer)
        outputs = model._prefill(input_ids, generation_config, model_kwargs)
        cache = next(outputs[name] for name in CACHE_NAMES if outputs.get(name) is not None)
        if not isinstance(cache, VerifiedCache):
            raise ChunkError("verify=True needs use_cache=True, and a cache that was made with it")
        cache.activate_past_recording()
        texts.take(outputs.logits[:, -1:], together=True)
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs, is_encoder_decoder=False)
        del outputs
        if not texts.is_done:
            _Cycles(model, cache, texts, model_kwargs, self.counters).run()
        sequences = texts.end()
        if not generation_config.return_dict_in_generate:
            return sequences
        name = next(name for name in CACHE_NAMES if name in GenerateDecoderOnlyOutput.__dataclass_fields__)
        told: dict[str, Any] = {"sequences": sequences, "scores": texts.scores, "logits": texts.logits, name: cache}
        return GenerateDecoderOnlyOutput(**told)


def _require(config: Any, assistant_model: Any | None, processors: LogitsProcessorList) -> None:
    """Refuses what cannot be verified.

    Raises:
        ChunkError: as said.
    """
    mode = config.get_generation_mode(assistant_model)
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ChunkError(f"verify=True writes greedily or by sampling, not by {mode.value.replace('_', ' ')}")
    if not config.use_cache:
        raise ChunkError("verify=True needs use_cache=True")
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        raise ChunkError("verify=True gives no attentions and no hidden states: leave output_attentions and the like")
    for each in processors:
        if isinstance(each, _STATEFUL):
            raise ChunkError(
                f"verify=True asks processors about tokens that may be dropped, and {type(each).__name__} counts on "
                "each being kept: leave it out, or verify"
            )


class _Cycles:
    """Drafts and verifies until the texts are done."""

    def __init__(self, model: Any, cache: VerifiedCache, texts: Texts, options: dict[str, Any], counters: Counters):
        self._model, self._cache, self._texts, self._counters = model, cache, texts, counters
        self._pace = Pace(len(texts.lengths), cache.share(sum(each.nbytes for each in model.parameters())))
        self._mask = options.get("attention_mask")
        self._options, self._position = _first_inputs(model, texts, options)

    def run(self) -> None:
        """All cycles; the cache then holds what ``generate`` leaves in one."""
        while not self._texts.is_done:
            self._cycle(self._length())
        self._even()

    def _length(self) -> int:
        """Tokens to draft."""
        if not self._cache.gains:
            return 0
        return self._pace.length(self._texts.active, min(self._texts.left - 1, MOST_DRAFTED))

    def _cycle(self, drafted: int) -> None:
        if drafted and self._pace.is_untried:  # of the whole prompt, which no other cycle does: it counts for none
            self._cache.summarise(self._texts.ids.device)
        watch = Stopwatch(self._texts.ids.device)
        if drafted:
            with self._cache.drafting(self._texts.ids.device):
                watch.lap()
                for number in range(drafted):
                    self._texts.draft(self._forward(self._texts.lengths - 1 + number, 1), number)
        else:
            watch.lap()
        watch.lap()
        logits = self._read(self._texts.lengths - 1, drafted + 1)
        right, kept = self._texts.take(logits, together=not self._cache.is_ragged)
        self._cache.keep(drafted + 1, kept)
        self._counters.verified(drafted, right)
        self._pace.saw(drafted, right)
        watch.lap()
        self._pace.took(drafted, *watch.seconds())

    def _read(self, places: np.ndarray, count: int) -> Tensor:
        """Logits [B, count, V] of a pass that reads everything; its keys and values stay until `VerifiedCache.keep`."""
        with self._cache.reading(count, self._texts.ids.device):
            return self._forward(places, count)

    def _forward(self, places: np.ndarray, count: int) -> Tensor:
        """Logits [B, count, V] of the tokens from a place of each row on, int64 [B]."""
        at, tokens = self._texts.tokens(places, count)
        positions = self._position + (at - self._texts.prompt_length)
        options = dict(self._options)
        if self._mask is not None and not self._cache.is_ragged:  # the other layers' masks are made of it
            grown = int(places.max()) + count - self._mask.shape[1]
            options["attention_mask"] = torch.nn.functional.pad(self._mask, (0, grown), value=1)
        logits: Tensor = self._model(input_ids=tokens, position_ids=positions, **options).logits
        return logits[:, -count:]

    def _even(self) -> None:
        """Leaves as many tokens in all rows: where a text ended early, the padding behind it too."""
        length = self._texts.length - 1
        self._cache.truncate(length)
        missing = length - self._cache.lengths
        if missing.any():
            count = int(missing.max())
            self._read(self._cache.lengths.copy(), count)
            self._cache.keep(count, missing)


def _first_inputs(model: Any, texts: Texts, options: dict[str, Any]) -> tuple[dict[str, Any], Tensor]:
    """What every pass is given, and the position of the first token that is written, [..., B or 1, 1].

    Raises:
        ChunkError: the model wants more than tokens, positions and a cache.
    """
    ids = texts.ids[:, : texts.prompt_length + 1]
    inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **options)
    unknown = [name for name, value in inputs.items() if isinstance(value, Tensor) and name not in _HELD]
    if unknown:
        raise ChunkError(f"verify=True does not know what {type(model).__name__} does with {', '.join(unknown)}")
    if inputs.get("position_ids") is None:
        raise ChunkError(f"verify=True must give positions, and {type(model).__name__} makes its own")
    cache = {name: inputs[name] for name in CACHE_NAMES if inputs.get(name) is not None}
    return cache | {"use_cache": True, "return_dict": True}, inputs["position_ids"][..., -1:]
