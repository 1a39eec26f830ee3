"""Inference-time decoding middleware for large language models."""

from decoding.errors import DecodingError
from decoding.generation import generate
from decoding.style import StylePrior
from ngram import NGramError, NGramModel

__version__ = "0.1.0"
__all__ = ["DecodingError", "NGramError", "NGramModel", "StylePrior", "generate"]
