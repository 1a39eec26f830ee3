"""Where chunks end: sentences by rule, as labels for the boundary detector, and what stands in for it untrained."""

from __future__ import annotations

import re
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from chunkllm.errors import ChunkError

_punctuation: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()
_ENDS_SENTENCE = re.compile(r"[.!?…。！？][\"'”’»)\]]*\s*$|\n")


def sentence_ends(text: str, language: str = "en") -> list[int]:
    """The place behind each sentence's last character that is no space, found by pysbd's rules.

    A piece without a letter or digit (a lone closing quote) belongs to the sentence before it.

    Args:
        text: with paragraphs on one line each; pysbd takes every line end for the end of a sentence.
        language: a code that pysbd knows.

    Raises:
        ChunkError: pysbd is missing, or does not know the language.
    """
    try:
        import pysbd
        from pysbd.languages import LANGUAGE_CODES
    except ImportError as error:
        raise ChunkError("sentences are found by pysbd: pip install pysbd") from error
    if language not in LANGUAGE_CODES:
        raise ChunkError(f"pysbd does not know the language {language!r}: choose from {', '.join(LANGUAGE_CODES)}")
    segmenter = pysbd.Segmenter(language=language, clean=False)
    ends: list[int] = []
    at = 0
    for paragraph in text.splitlines(keepends=True):
        place = at
        for sentence in segmenter.segment(paragraph):
            core = sentence.strip()
            found = text.find(core, place)
            if not core or found < 0:
                continue
            place = found + len(core)
            if ends and not any(character.isalnum() for character in core):
                ends[-1] = place
            else:
                ends.append(place)
        at += len(paragraph)
    return ends


def boundary_labels(text: str, tokenizer: Any, language: str = "en") -> tuple[np.ndarray, np.ndarray]:
    """Token ids int64 [T] of a text, and bool [T]: does a sentence's last character lie in the token?

    Raises:
        ChunkError: as `sentence_ends`, or a tokenizer that does not know which characters a token has.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ChunkError("labels need a fast tokenizer, which knows the characters of each token")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    stops = np.array([stop for _, stop in encoded["offset_mapping"]], np.int64)
    labels = np.zeros(len(stops), bool)
    places = np.searchsorted(stops, np.array(sentence_ends(text, language), np.int64))
    labels[places[places < len(stops)]] = True
    return np.array(encoded["input_ids"], np.int64), labels


def punctuation_boundaries(tokenizer: Any) -> Tensor:
    """bool [V]: does the token's text end a sentence, or a line? Stands in where no detector is trained.

    Looked up once for a tokenizer, which takes seconds where it has many tokens, and again if it gets more.
    """
    table = _punctuation.get(tokenizer)
    if table is None or len(table) != len(tokenizer):
        texts = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        table = _punctuation[tokenizer] = torch.tensor([_ENDS_SENTENCE.search(text) is not None for text in texts])
    return table


class Agreement(NamedTuple):
    """How predicted boundaries agree with labels."""

    precision: float
    recall: float
    f1: float


def agreement(predicted: Tensor, labels: Tensor) -> Agreement:
    """Precision, recall and F1 of bool tensors of one shape."""
    both = float((predicted & labels).sum())
    precision, recall = both / max(float(predicted.sum()), 1.0), both / max(float(labels.sum()), 1.0)
    return Agreement(precision, recall, 2 * precision * recall / max(precision + recall, 1e-9))
