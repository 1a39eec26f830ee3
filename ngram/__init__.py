"""N-gram language models over token ids: counting, smoothing, and batched look-up over the whole vocabulary."""

from ngram.errors import NGramError
from ngram.model import NGramModel

__all__ = ["NGramError", "NGramModel"]
