"""`generate`: text in, text out, with processors that bind themselves to the model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from os import PathLike
from typing import Any, overload

from chunkllm import ChunkError, ChunkSelection
from decoding.errors import DecodingError
from decoding.models import TRUNCATIONS, input_device, load_model, load_tokenizer, undoing
from decoding.style.prior import StylePrior
from decoding.temperature.phases import PhaseTemperature
from decoding.temperature.processors import AutoTemperature, Temperature
from decoding.tokens import as_chats, continuations, pad_id, padded, require_text


@overload
def generate(model: Any, prompts: str, **options: Any) -> str: ...
@overload
def generate(model: Any, prompts: list[str], **options: Any) -> list[str]: ...
def generate(
    model: Any,
    prompts: str | list[str],
    *,
    tokenizer: Any | None = None,
    logits_processor: Sequence[Any] = (),
    max_new_tokens: int = 64,
    chat: bool = False,
    **options: Any,
) -> str | list[str]:
    """Continues one prompt, or a list of them in one batch, or answers them.

    Args:
        model: a folder, a hub id, the embedded default's name, or a loaded model (then with its tokenizer).
        prompts: plain text.
        tokenizer: of a loaded model.
        logits_processor: transformers' processors. A `StylePrior`, an `AutoTemperature` and a `PhaseTemperature` are
            bound to tokenizer and model for the call, and a `ChunkSelection` is attached to the model.
            With one of `decoding.temperature.processors` the texts are sampled, from all tokens unless
            ``options`` has ``top_k``, ``top_p`` or the like.
        max_new_tokens: how many tokens to write at most.
        chat: whether prompts are what a user says, to be put into the model's chat template. Without it they are
            continued as they stand, which few models that are made to be talked to do well.
        options: anything that ``model.generate`` takes (``do_sample``, ``num_beams``, ``stop_strings``, …).

    Returns:
        The continuations, without the prompts: one text for one prompt, else a list.

    Raises:
        DecodingError: no prompt, an empty one, a loaded model without its tokenizer, two temperatures, or ``chat`` with
            a model that has no chat template.
        ChunkError: chunks cannot be selected in the model, or two selections.
    """
    batch = [prompts] if isinstance(prompts, str) else list(prompts)
    if not batch or not all(isinstance(prompt, str) and prompt for prompt in batch):
        raise DecodingError("prompts must be a text, or a list of texts, and none empty")
    for number, prompt in enumerate(batch, start=1):
        require_text(prompt, f"prompt {number}")
    if not isinstance(logits_processor, Sequence):
        raise DecodingError(f"logits_processor must be a list: write [{type(logits_processor).__name__}(…)]")
    temperatures = sum(isinstance(processor, Temperature) for processor in logits_processor)
    _require_one_of_each(temperatures, logits_processor, options)
    is_loaded = not isinstance(model, str | PathLike)
    if is_loaded and tokenizer is None:
        raise DecodingError("a loaded model needs its tokenizer: generate(model, prompts, tokenizer=tokenizer)")
    tokenizer = tokenizer or load_tokenizer(str(model))
    batch = as_chats(batch, tokenizer) if chat else batch
    model = model if is_loaded else load_model(str(model))
    stops = options.get("eos_token_id") or getattr(options.get("generation_config"), "eos_token_id", None)
    processors: list[Any] = []
    for processor in logits_processor:
        if isinstance(processor, StylePrior):
            processor = processor.bound(tokenizer, model, stops)
        elif isinstance(processor, AutoTemperature | PhaseTemperature):
            processor = processor.bound(tokenizer, model)
        processors.append(processor)
    if temperatures:
        _sample_at_temperature_1(model, options)
    if "stop_strings" in options:
        options.setdefault("tokenizer", tokenizer)
    options.setdefault("pad_token_id", pad_id(tokenizer))
    is_decoder = not model.config.is_encoder_decoder
    inputs = padded(batch, tokenizer, input_device(model), on_the_left=is_decoder, add_special_tokens=not chat)
    with ExitStack() as attached:
        for selection in processors:
            if isinstance(selection, ChunkSelection):
                attached.enter_context(selection.attach(model, tokenizer))
        steps = [processor for processor in processors if not isinstance(processor, ChunkSelection)]
        output = model.generate(**inputs, logits_processor=steps, max_new_tokens=max_new_tokens, **options)
    sequences = getattr(output, "sequences", output)
    texts = continuations(sequences, inputs["input_ids"].shape[1] if is_decoder else 0, tokenizer)
    return texts[0] if isinstance(prompts, str) and len(texts) == 1 else texts


def _require_one_of_each(temperatures: int, processors: Sequence[Any], options: dict[str, Any]) -> None:
    """Refuses what would be done twice.

    Raises:
        DecodingError: two temperatures. ChunkError: two selections.
    """
    if temperatures > 1:
        raise DecodingError("two processors that set the temperature: each divides what the other left; keep one")
    for name, plain in (("temperature", 1.0), ("do_sample", True)):
        if temperatures and (given := options.get(name, plain)) != plain:
            raise DecodingError(f"{name}={given!r} and a processor that sets the temperature: leave one out")
    if sum(isinstance(processor, ChunkSelection) for processor in processors) > 1:
        raise ChunkError("with two selections in one call the model has a selection attached already: keep one")


def _sample_at_temperature_1(model: Any, options: dict[str, Any]) -> None:
    """What a processor that sets the temperature needs of ``model.generate``, whatever the model's own defaults are."""
    options |= {"do_sample": True, "temperature": 1.0}
    for name, value in ({"top_k": 0} | undoing(model, TRUNCATIONS)).items():
        options.setdefault(name, value)
