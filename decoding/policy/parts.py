"""What a policy is made of, opened, and what it becomes for one call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chunkllm import ChunkError, ChunkSelection
from chunkllm.calibration import open_saved
from decoding.errors import DecodingError
from decoding.policy.values import EMBEDDED, chunk_settings
from decoding.style.prior import StylePrior
from decoding.temperature.phases import PhaseTemperature
from decoding.temperature.processors import AutoTemperature
from decoding.temperature.selector import TemperatureSelector


def open_selector(name: str | None) -> TemperatureSelector:
    """The selector of a folder or a hub id, or the embedded one.

    Raises:
        DecodingError: none there, or a damaged one.
    """
    return TemperatureSelector.from_pretrained(None if name == EMBEDDED else name)


def open_selection(chunks: Any) -> ChunkSelection:
    """The selection of a policy's ``chunks``, with its adapters or calibration.

    Raises:
        DecodingError: no adapters there, damaged ones, or settings that contradict each other.
    """
    settings = chunk_settings(chunks)
    try:
        if (name := settings.pop("adapters", None)) is not None:
            settings["adapters"] = open_saved(None if name == EMBEDDED else name)
        return ChunkSelection(**settings)
    except ChunkError as error:
        raise DecodingError(f"chunks: {error}") from error


def bound(parts: Sequence[Any], tokenizer: Any, model: Any, stop_ids: Any = None) -> list[Any]:
    """Processors for one call: those of ours that want tokenizer and model have them, others are as they were.

    Args:
        parts: processors, and whatever else `decoding.generate` takes among them.
        tokenizer: the generating model's.
        model: the generating model.
        stop_ids: more ids that end a text, in this call.

    Raises:
        DecodingError: as of `StylePrior.bound`, `AutoTemperature.bound` and `PhaseTemperature.bound`.
    """
    made: list[Any] = []
    for part in parts:
        if isinstance(part, StylePrior):
            made.append(part.bound(tokenizer, model, stop_ids))
        elif isinstance(part, AutoTemperature | PhaseTemperature):
            made.append(part.bound(tokenizer, model))
        else:
            made.append(part)
    return made
