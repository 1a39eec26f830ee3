"""Inference-time decoding middleware for large language models."""

from chunkllm import ChunkAdapters, ChunkError, ChunkSelection
from decoding.errors import DecodingError
from decoding.generation import generate
from decoding.selector import TemperatureSelector
from decoding.style import StylePrior
from decoding.temperature import AutoTemperature, DynamicTemperature, EntropyDependentTemperature, FixedTemperature
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
