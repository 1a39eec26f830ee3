"""Counting n-grams of token ids with sorted integer keys.

The k-grams of a corpus form a trie: level ``k`` holds the distinct k-grams in lexicographic order, each as a pair
(index of its first k−1 tokens at level k−1, last token). Such a pair packs into one int64, so a level is one sort of
one integer per corpus position, and no Python loop runs over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngram.errors import NGramError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Level:
    """The distinct k-grams of a corpus, sorted. Level 1 holds every id of the vocabulary, seen or not.

    Attributes:
        words: last token of each k-gram, int64 [N].
        parents: index at level k−1 of the first k−1 tokens, int64 [N] (zeros at level 1).
        suffixes: index at level k−1 of the last k−1 tokens, int64 [N] (zeros at level 1).
        counts: occurrences, int64 [N].
        opens_document: whether the k-gram stands at the start of some document, bool [N].
    """

    words: Ints
    parents: Ints
    suffixes: Ints
    counts: Ints
    opens_document: NDArray[np.bool_]


def count_ngrams(
    documents: Any, vocab_size: int, order: int, bos_id: int | None = None, eos_id: int | None = None
) -> list[Level]:
    """Counts the 1- to ``order``-grams of a corpus. No n-gram spans two documents.

    Args:
        documents: a 1-D integer array, or an iterable of them.
        vocab_size: number of token ids, V.
        order: longest n-gram.
        bos_id: set before every document, if given.
        eos_id: set after every document, if given.

    Returns:
        One `Level` per order, shortest first.

    Raises:
        NGramError: no tokens, ids outside [0, V), marker ids inside a document, or no document as long as the order.
    """
    tokens, remaining = _concatenate(documents_as_arrays(documents, vocab_size), order, bos_id, eos_id)
    starts = np.flatnonzero(np.concatenate(([True], remaining[:-1] == 1)))
    counts = np.bincount(tokens, minlength=vocab_size)
    opens = np.zeros(vocab_size, bool)
    opens[tokens[starts]] = True
    zeros = np.zeros(vocab_size, np.int64)
    levels = [Level(np.arange(vocab_size), zeros, zeros, counts, opens)]
    nodes = tokens  # index of the (k−1)-gram that begins at each position
    for k in range(2, order + 1):
        here = np.flatnonzero(remaining >= k)
        keys = nodes[here] * vocab_size + tokens[here + k - 1]
        by_key = np.argsort(keys)
        ordered = keys[by_key]
        is_new = np.concatenate(([True], ordered[1:] != ordered[:-1]))
        first = np.flatnonzero(is_new)
        unique = ordered[first]
        longer = np.full(len(tokens), -1)
        longer[here[by_key]] = np.cumsum(is_new) - 1
        opens = np.zeros(len(unique), bool)
        opens[longer[starts[remaining[starts] >= k]]] = True
        levels.append(
            Level(
                words=unique % vocab_size,
                parents=unique // vocab_size,
                suffixes=nodes[here[by_key[first]] + 1],
                counts=np.diff(np.append(first, len(ordered))),
                opens_document=opens,
            )
        )
        nodes = longer
    return levels


def documents_as_arrays(documents: Any, vocab_size: int) -> list[Ints]:
    """Normalises a 1-D array, a list of ids or an iterable of either to int64 arrays of ids in [0, V), none empty."""
    if hasattr(documents, "detach"):
        documents = documents.detach().cpu().numpy()
    is_array = isinstance(documents, np.ndarray) and documents.ndim == 1 and documents.dtype != object
    if not is_array:
        if not isinstance(documents, Iterable):
            raise NGramError(f"documents must be token ids or an iterable of them, not {type(documents).__name__}")
        documents = list(documents)
    if is_array or (documents and np.ndim(documents[0]) == 0):
        documents = [documents]
    arrays = [ids for ids in map(_as_ids, documents) if ids.size]
    if not arrays:
        raise NGramError("the corpus holds no tokens")
    low, high = min(ids.min() for ids in arrays), max(ids.max() for ids in arrays)
    if low < 0 or high >= vocab_size:
        raise NGramError(f"token ids must lie in [0, {vocab_size}); the corpus has {low} to {high}")
    return arrays


def _as_ids(document: Any) -> Ints:
    ids = np.asarray(document)
    if ids.ndim != 1:
        raise NGramError(f"a document must be one-dimensional, not of shape {ids.shape}")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise NGramError(f"a document must hold integer token ids, not {ids.dtype}: tokenize the text first")
    return ids.astype(np.int64)


def _concatenate(documents: list[Ints], order: int, bos_id: int | None, eos_id: int | None) -> tuple[Ints, Ints]:
    """Joins the documents: token ids [T], and how many tokens of its document each position begins, itself one [T]."""
    text = np.concatenate(documents)
    for name, marker in (("bos_id", bos_id), ("eos_id", eos_id)):
        if marker is None:
            continue
        if (text == marker).any():
            raise NGramError(f"the documents hold {name} {marker}: leave the markers out, they are added here")
    before = np.array([] if bos_id is None else [bos_id], np.int64)
    after = np.array([] if eos_id is None else [eos_id], np.int64)
    if before.size or after.size:
        text = np.concatenate([part for ids in documents for part in (before, ids, after)])
    lengths = np.array([ids.size for ids in documents]) + before.size + after.size
    if lengths.max() < order:
        raise NGramError(
            f"the longest document has {lengths.max()} tokens, fewer than the order {order}: "
            "give a longer corpus or a lower order"
        )
    remaining = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    return text, remaining
