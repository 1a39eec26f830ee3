"""Counting n-grams of token ids with sorted integer keys.

The k-grams of a corpus form a trie: level ``k`` holds the distinct k-grams in lexicographic order, each as a pair
(index of its first k−1 tokens at level k−1, last token). Such a pair packs into one int64, so a level is one sort of
one integer per corpus position, and no Python loop runs over tokens.

Memory is what limits the corpus: a level is handed over before the next is counted, and nothing that lasts longer
than a sort is wider than it must be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngram.errors import NGramError

Ints = NDArray[np.int64]
Indices = NDArray[np.signedinteger]
"""Positions, ids and counts: int32, but int64 in a corpus of 2^31 tokens and more."""
NO_TOKENS = "the corpus holds no tokens"
_NO_KEY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Level:
    """The distinct k-grams of a corpus, sorted. Level 1 holds every id of the vocabulary, seen or not.

    Attributes:
        words: last token of each k-gram, `Indices` [N].
        parents: index at level k−1 of the first k−1 tokens, ascending `Indices` [N] (zeros at level 1).
        suffixes: index at level k−1 of the last k−1 tokens, `Indices` [N] (zeros at level 1).
        counts: occurrences, `Indices` [N].
        opens_document: whether the k-gram stands at the start of some document, bool [N].
    """

    words: Indices
    parents: Indices
    suffixes: Indices
    counts: Indices
    opens_document: NDArray[np.bool_]


def count_ngrams(
    documents: Any, vocab_size: int, order: int, bos_id: int | None = None, eos_id: int | None = None
) -> Iterator[Level]:
    """Counts the 1- to ``order``-grams of a corpus. No n-gram spans two documents.

    Args:
        documents: a 1-D integer array, or an iterable of them.
        vocab_size: number of token ids, V.
        order: longest n-gram.
        bos_id: set before every document, if given.
        eos_id: set after every document, if given.

    Yields:
        One `Level` per order, shortest first.

    Raises:
        NGramError: no tokens, ids outside [0, V), marker ids inside a document, or no document as long as the order.
    """
    text, lengths = _concatenate(_documents(documents, vocab_size), order, bos_id, eos_id)
    ends = np.cumsum(lengths)
    nodes = text  # index of the k-gram that begins at each position
    begins = np.ones(len(text), bool)  # whether one does
    level = _first_level(text, vocab_size)
    for k in range(1, order + 1):
        level.opens_document[nodes[(ends - lengths)[lengths >= k]]] = True
        yield level
        del level  # the caller may let go of it before the next one takes room
        if k < order:
            begins[ends[lengths >= k] - k] = False  # a document's last k-gram has nothing after it
            level, nodes = _longer(nodes, text[k:], begins, vocab_size)


def _first_level(text: Indices, vocab_size: int) -> Level:
    zeros = np.zeros(vocab_size, text.dtype)
    counts = np.bincount(text, minlength=vocab_size).astype(text.dtype)
    return Level(np.arange(vocab_size, dtype=text.dtype), zeros, zeros, counts, np.zeros(vocab_size, bool))


def _longer(nodes: Indices, following: Indices, begins: NDArray[np.bool_], vocab_size: int) -> tuple[Level, Indices]:
    """The (k+1)-grams, made of the k-grams.

    Args:
        nodes: index at level k of the k-gram that begins at each position [T].
        following: the token after it [T − k].
        begins: whether a (k+1)-gram begins there [T].
        vocab_size: V.

    Returns:
        The level, with no documents opened, and ``nodes`` for the one after it.
    """
    keys = np.multiply(nodes, vocab_size, dtype=np.int64)
    keys[: len(following)] += following
    keys[~begins] = _NO_KEY
    by_key = np.argsort(keys)[: np.count_nonzero(begins)]
    keys = keys[by_key]
    is_new = np.concatenate(([True], keys[1:] != keys[:-1]))
    longer = np.zeros_like(nodes)
    longer[by_key] = np.cumsum(is_new, dtype=nodes.dtype) - 1
    suffixes = nodes[by_key[is_new] + 1]
    del by_key
    keys = keys[is_new]
    parents = (keys // vocab_size).astype(nodes.dtype)
    keys -= np.multiply(parents, vocab_size, dtype=np.int64)
    counts = np.diff(np.flatnonzero(np.append(is_new, True))).astype(nodes.dtype)
    return Level(keys.astype(nodes.dtype), parents, suffixes, counts, np.zeros(len(keys), bool)), longer


def documents_as_arrays(documents: Any, vocab_size: int) -> list[Ints]:
    """Normalises a 1-D array, a list of ids or an iterable of either to int64 arrays of ids in [0, V), none empty."""
    return [ids.astype(np.int64) for ids in _documents(documents, vocab_size)]


def _documents(documents: Any, vocab_size: int) -> list[NDArray[np.integer]]:
    """`documents_as_arrays`, but arrays stay as they are given: copies of a corpus take room."""
    if hasattr(documents, "detach"):
        documents = documents.detach().cpu().numpy()
    is_array = isinstance(documents, np.ndarray) and documents.ndim == 1 and documents.dtype != object
    if not is_array:
        if not isinstance(documents, Iterable):
            raise NGramError(f"documents must be token ids or an iterable of them, not {type(documents).__name__}")
        documents = list(documents)
    if is_array or (documents and np.ndim(documents[0]) == 0):
        documents = [documents]
    arrays = [ids for ids in map(as_ids, documents) if ids.size]
    if not arrays:
        raise NGramError(NO_TOKENS)
    require_known(min(ids.min() for ids in arrays), max(ids.max() for ids in arrays), vocab_size)
    return arrays


def require_known(low: int, high: int, vocab_size: int) -> None:
    """Refuses ids outside [0, V), given the least and the highest."""
    if low < 0 or high >= vocab_size:
        raise NGramError(f"token ids must lie in [0, {vocab_size}); the corpus has {low} to {high}")


def markers_around(bos_id: int | None, eos_id: int | None) -> tuple[Ints, Ints]:
    """What is set before a document, and after it."""
    before, after = (np.array([] if marker is None else [marker], np.int64) for marker in (bos_id, eos_id))
    return before, after


def marker_inside(name: str, marker: int) -> NGramError:
    """What is raised for documents that hold a marker."""
    return NGramError(f"the documents hold {name} {marker}: leave the markers out, they are added here")


def too_short(longest: int, order: int) -> NGramError:
    """What is raised where no document is as long as the order."""
    return NGramError(
        f"the longest document has {longest} tokens, fewer than the order {order}: "
        "give a longer corpus or a lower order"
    )


def as_ids(document: Any) -> NDArray[np.integer]:
    """A document's token ids, [T].

    Raises:
        NGramError: that is none.
    """
    ids = np.asarray(document)
    if ids.ndim != 1:
        raise NGramError(f"a document must be one-dimensional, not of shape {ids.shape}")
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise NGramError(f"a document must hold integer token ids, not {ids.dtype}: tokenize the text first")
    return ids


def _concatenate(
    documents: list[NDArray[np.integer]], order: int, bos_id: int | None, eos_id: int | None
) -> tuple[Indices, Ints]:
    """Joins the documents and the markers around them: token ids [T], and the length of each document."""
    before, after = markers_around(bos_id, eos_id)
    lengths = np.array([ids.size for ids in documents]) + before.size + after.size
    dtype = np.result_type(np.int32, np.min_scalar_type(-int(lengths.sum()) - 1))
    parts = [part for ids in documents for part in (before, ids, after)]
    text = np.concatenate(parts, dtype=dtype, casting="unsafe")
    for name, marker in (("bos_id", bos_id), ("eos_id", eos_id)):
        if marker is not None and np.count_nonzero(text == marker) > len(documents):
            raise marker_inside(name, marker)
    if lengths.max() < order:
        raise too_short(int(lengths.max()), order)
    return text, lengths
