"""Inference-time decoding middleware for large language models."""

from chunkllm import ChunkAdapters, ChunkError, ChunkSelection
from decoding.errors import DecodingError
from decoding.generation import generate
from decoding.style.prior import StylePrior
from decoding.temperature.processors import (
    AutoTemperature,
    DynamicTemperature,
    EntropyDependentTemperature,
    FixedTemperature,
)
from decoding.temperature.selector import TemperatureSelector
from ngram import NGramError, NGramModel

__version__ = "0.1.0"
__all__ = [
    "AutoTemperature",
    "ChunkAdapters",
    "ChunkError",
    "ChunkSelection",
    "DecodingError",
    "DynamicTemperature",
    "EntropyDependentTemperature",
    "FixedTemperature",
    "NGramError",
    "NGramModel",
    "StylePrior",
    "TemperatureSelector",
    "generate",
]
