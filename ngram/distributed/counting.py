"""The first step: what occurs in some of the documents, and how often.

Counted are *windows*: at each token, it and the tokens before it, up to n of one document, last one first. Sorted, they
hold the n-grams of all orders, and what precedes these, side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ngram.counts import NO_TOKENS, as_ids, marker_inside, markers_around, require_known, too_short
from ngram.distributed.runs import Sorter, records_of
from ngram.distributed.settings import COUNT, PLAN, Place, load, save, whole_ranges
from ngram.errors import NGramError

_TOKENS = 1 << 18  # that are looked at together


def count(place: Place, documents: Iterable[Any], folder: Path) -> None:
    """Counts the windows of some documents.

    Args:
        place: what is told.
        documents: token ids, 1-D integers each.
        folder: to write to.

    Raises:
        NGramError: ids outside [0, V), or markers inside a document.
    """
    settings, packing = place.settings, place.packing(place.settings.order)
    dtype = place.counted(settings.order)
    sorter = Sorter(folder, dtype, place.rows(dtype, 1), sums=True)
    tokens, longest = np.zeros(settings.vocab_size, np.int64), 0
    for pieces in _batches(_marked(documents, place), settings.order - 1):
        columns = _windows(pieces, settings.order)
        sorter.add(records_of(dtype, packing.pack(columns), count=np.ones(len(columns[0]), np.int64)))
        tokens += np.bincount(columns[0] - 1, minlength=settings.vocab_size)
        longest = max(longest, *(piece.length for piece in pieces))
    sorter.flush()
    save(folder / "tokens.safetensors", counts=tokens, longest=np.array([longest]))


class _Piece:
    """Some tokens of a document, behind the ones before them.

    Attributes:
        ids: all of them.
        skip: how many came before.
        length: of the document.
    """

    def __init__(self, ids: NDArray[np.integer], skip: int, length: int):
        self.ids, self.skip, self.length = ids, skip, length


def _marked(documents: Iterable[Any], place: Place) -> Iterator[NDArray[np.integer]]:
    """The documents that hold anything, with their markers."""
    settings = place.settings
    before, after = markers_around(settings.bos_id, settings.eos_id)
    for document in documents:
        ids = as_ids(document)
        if not len(ids):
            continue
        require_known(int(ids.min()), int(ids.max()), settings.vocab_size)
        for name, marker in (("bos_id", settings.bos_id), ("eos_id", settings.eos_id)):
            if marker is not None and (ids == marker).any():
                raise marker_inside(name, marker)
        yield np.concatenate((before, ids, after), dtype=np.int64, casting="unsafe")


def _batches(documents: Iterable[NDArray[np.integer]], context: int) -> Iterator[list[_Piece]]:
    """Documents that are short together, and a long one in pieces."""
    held: list[_Piece] = []
    size = 0
    for ids in documents:
        for begin in range(0, len(ids), _TOKENS):
            skip = min(begin, context)
            held.append(_Piece(ids[begin - skip : begin + _TOKENS], skip, len(ids)))
            size += len(held[-1].ids)
            if size >= _TOKENS:
                yield held
                held, size = [], 0
    if held:
        yield held


def _windows(pieces: list[_Piece], order: int) -> list[NDArray[np.int64]]:
    """The token ids plus one of each window, [T] each, last token first; 0 before a document."""
    text = np.concatenate([piece.ids for piece in pieces]) + 1
    sizes = np.array([len(piece.ids) for piece in pieces])
    within = np.arange(len(text)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    counts = within >= np.repeat([piece.skip for piece in pieces], sizes)
    columns = []
    for back in range(order):
        column = np.zeros(len(text), np.int64)
        column[back:] = text[: len(text) - back]
        column[within < back] = 0
        columns.append(column[counts])
    return columns


def plan(place: Place, folder: Path) -> None:
    """Divides the tokens among parts.

    Raises:
        NGramError: no tokens, or no document as long as the order.
    """
    settings = place.settings
    counted = [load(each / "tokens.safetensors") for each in place.folders(COUNT)]
    tokens = np.sum([each["counts"] for each in counted], axis=0)
    longest = max(int(each["longest"][0]) for each in counted)
    if not tokens.any():
        raise NGramError(NO_TOKENS)
    if longest < settings.order:
        raise too_short(longest, settings.order)
    save(folder / f"{PLAN}.safetensors", bounds=np.array(whole_ranges(tokens, settings.parts)), tokens=tokens)
