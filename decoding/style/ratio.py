"""Log-likelihood ratios of tokens: how much likelier a style's text has a token than a background has.

The background that steers best is what the model itself writes: a prior that is high for frequent words sharpens, a
ratio to the model's own frequencies moves it where the style differs from it, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from decoding.errors import DecodingError
from decoding.style.background import model_frequencies
from decoding.style.source import StyleSource, load_corpus
from decoding.tokens import control_ids, id_count, tokenize

RARE = 5e-5
"""ε: tokens much rarer than this on both sides are left alone. One in 20,000."""
MOST_LOG_RATIO = 2.0
"""c: no token's odds change by more than a factor of e^(2λ). Unbounded, a few words of the style get into loops."""
MODEL, CORPUS = "model", "corpus"
NEEDS_MODEL = (
    'the ratio to what the model writes needs the model: StylePrior(…, mode="ratio", tokenizer=tokenizer, model=model),'
    ' or decoding.generate, which binds it; or choose background="corpus", or a corpus'
)


def checked_background(background: str | PathLike) -> str:
    """What `ratio_to` takes, other than token ids.

    Raises:
        DecodingError: not "model" or "corpus", and no text either.
    """
    if background in (MODEL, CORPUS):
        return str(background)
    if not StyleSource.parse(background).is_text:
        raise DecodingError(f'background must be "{MODEL}", "{CORPUS}" or a text, and {background} is a saved prior')
    return str(background)


def log_ratio(style: Tensor, background: Tensor, most: float = MOST_LOG_RATIO) -> Tensor:
    """r(w) = log((p(w) + ε) / (q(w) + ε)), cut off at ±c.

    Args:
        style: p, relative frequencies of all token ids in the style, float [V].
        background: q, likewise.
        most: c.

    Returns:
        float32 [V].
    """
    ratio = ((style.double() + RARE) / (background.double() + RARE)).log()
    return ratio.clamp_(-most, most).float()


def frequencies(
    documents: Sequence[np.ndarray], vocab_size: int, left_out: int | Sequence[int] | None = None
) -> Tensor:
    """Relative frequencies of token ids, float64 [V], those of ``left_out`` (which are no text) not counted."""
    counts = np.bincount(np.concatenate(documents), minlength=vocab_size).astype(np.float64)
    if left_out is not None:
        counts[left_out] = 0
    return torch.from_numpy(counts / max(counts.sum(), 1))


def ratio_to(
    background: str | Sequence[np.ndarray],
    documents: Sequence[np.ndarray],
    tokenizer: Any,
    model: Any | None = None,
    most: float = MOST_LOG_RATIO,
) -> Tensor:
    """The log-ratio row of a style's documents to a background, float32 [V].

    Args:
        background: "model", what the model writes by itself; "corpus", the documents' own frequencies, whose ratio is
            0 everywhere, so that contexts alone steer; else a corpus, as in `load_corpus` or as token ids.
        documents: int64 token ids.
        tokenizer: the model's.
        model: needed for "model".
        most: as for `log_ratio`.

    Raises:
        DecodingError: "model" without a model, or no such corpus.
    """
    size, no_text = id_count(tokenizer), control_ids(tokenizer)
    if isinstance(background, str) and background == CORPUS:
        return torch.zeros(size)
    if isinstance(background, str) and background == MODEL:
        if model is None:
            raise DecodingError(NEEDS_MODEL)
        other = model_frequencies(model, tokenizer)
    else:
        texts = tokenize(load_corpus(background).documents, tokenizer) if isinstance(background, str) else background
        other = frequencies(texts, size, no_text)
    return log_ratio(frequencies(documents, size, no_text), other, most)
