"""Inference-time decoding middleware for large language models."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from decoding.neighbours import installed_neighbours

if TYPE_CHECKING:
    from chunkllm import ChunkAdapters, ChunkError, ChunkSelection
    from decoding.errors import DecodingError
    from decoding.generation import Generation, generate
    from decoding.policy import Policy
    from decoding.style import StylePrior
    from decoding.temperature import (
        AutoTemperature,
        DynamicTemperature,
        EntropyDependentTemperature,
        FixedTemperature,
        PhaseTemperature,
        TemperatureSelector,
    )
    from ngram import NGramError, NGramModel

__version__ = "0.2.0"
__all__ = [
    "AutoTemperature",
    "ChunkAdapters",
    "ChunkError",
    "ChunkSelection",
    "DecodingError",
    "DynamicTemperature",
    "EntropyDependentTemperature",
    "FixedTemperature",
    "Generation",
    "NGramError",
    "NGramModel",
    "PhaseTemperature",
    "Policy",
    "StylePrior",
    "TemperatureSelector",
    "generate",
]
_ROOMS = {
    "chunkllm": ("ChunkAdapters", "ChunkError", "ChunkSelection"),
    "decoding.errors": ("DecodingError",),
    "decoding.generation": ("Generation", "generate"),
    "decoding.policy": ("Policy",),
    "decoding.style": ("StylePrior",),
    "decoding.temperature": (
        "AutoTemperature",
        "DynamicTemperature",
        "EntropyDependentTemperature",
        "FixedTemperature",
        "PhaseTemperature",
        "TemperatureSelector",
    ),
    "ngram": ("NGramError", "NGramModel"),
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: importing this package imports neither torch nor its sibling packages."""
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    for sentence in installed_neighbours():
        warnings.warn(sentence, stacklevel=2)
    try:
        value = getattr(import_module(_ROOM_OF[name]), name)
    except ImportError as error:
        raise _explained(error) from error
    globals()[name] = value
    return value


def _explained(error: ImportError) -> ImportError:
    """Names the module that stands where a sibling package should, such as a folder of the user's."""
    package = (error.name or "").partition(".")[0]
    if package not in ("ngram", "chunkllm") or package not in sys.modules:
        return error
    found = getattr(sys.modules[package], "__file__", None) or list(sys.modules[package].__path__)
    return ImportError(f"decoding needs its own package {package!r}, and Python found {found}: rename it or move it")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
