"""The second step: the n-grams that end with some tokens, and what they count.

Windows that end alike lie side by side, so what precedes an n-gram is seen while they pass.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from ngram.distributed.packing import Keys, Packing, begins
from ngram.distributed.runs import Records, Sorter, merged, record, records_of, runs_in, summed
from ngram.distributed.settings import ADJUST, COUNT, DISCOUNT, Place, load, save

_DISTINGUISHED = 5  # counts of counts 0 to 4, of which discounts are made


def adjust(place: Place, part: int, folder: Path) -> None:
    """Writes n-grams of 2 to n tokens with their counts, sorted from their first tokens on, and what single ones count.

    Args:
        place: what is told.
        part: whose last tokens.
        folder: to write to.
    """
    settings, packing, tokens = place.settings, place.packing(place.settings.order), place.ranges[part]
    unigrams = np.zeros(settings.vocab_size, np.int64)
    orders = [_Order(place, length, folder) for length in range(2, settings.order + 1)]
    before: Keys | None = None
    dtype = place.counted(settings.order)
    for windows in merged(runs_in(place.folders(COUNT), dtype), packing, tokens, place.rows(dtype, settings.order)):
        windows = summed(windows)
        keys, occurrences = windows["key"], windows["count"]
        new: list[Any] = [_begins(packing, keys, length, before) for length in range(1, settings.order + 1)]
        single = packing.column(keys, 0) - 1
        amounts = new[1].astype(np.int64) if settings.order > 1 and _is_adjusted(place) else occurrences
        np.add.at(unigrams, single, _unless_first(place, single, amounts, occurrences))
        for order, (mine, longer) in zip(orders, pairwise([*new[1:], None]), strict=True):
            order.add(packing, keys, occurrences, mine, longer)
        before = keys[-1].copy()
    for order in orders:
        order.close()
    save(folder / "unigrams.safetensors", counts=unigrams)
    counts = [np.zeros(_DISTINGUISHED, np.int64), *(order.counts for order in orders)]
    save(folder / "counts.safetensors", counts=np.stack(counts))


def _begins(packing: Packing, keys: Keys, length: int, before: Keys | None) -> np.ndarray:
    last = None if before is None else packing.prefix(before[None], length)[0]
    return begins(packing.prefix(keys, length), last)


def _is_adjusted(place: Place) -> bool:
    """Whether below the highest order it counts what precedes."""
    return place.settings.smoothing == "kneser-ney"


def _unless_first(place: Place, first: np.ndarray, amounts: np.ndarray, occurrences: np.ndarray) -> np.ndarray:
    """Amounts, but occurrences of what begins with bos_id: nothing can precede that."""
    return amounts if place.settings.bos_id is None else np.where(first == place.settings.bos_id, occurrences, amounts)


class _Order:
    """Collects the n-grams of one length.

    Attributes:
        counts: how many have a count of 0 to 4, int64 [5].
    """

    def __init__(self, place: Place, length: int, folder: Path):
        self._place, self._length, self._packing = place, length, place.packing(length)
        self._dtype = place.adjusted(length)
        self._sorter = Sorter(folder / str(length), self._dtype, place.rows(self._dtype, place.settings.order))
        self._is_adjusted = _is_adjusted(place) and length < place.settings.order
        self._held = np.empty(0, record(self._packing, count=np.int64, preceding=np.int64))
        self.counts = np.zeros(_DISTINGUISHED, np.int64)

    def add(
        self, packing: Packing, keys: Keys, occurrences: np.ndarray, begins_here: np.ndarray, longer: np.ndarray | None
    ) -> None:
        """Takes windows.

        Args:
            packing: of the windows.
            keys: sorted, [N, W].
            occurrences: int64 [N].
            begins_here: whether the n-gram is another than in the window before, bool [N].
            longer: the same of n-grams that are longer by one; None if there are none.
        """
        starts = np.flatnonzero(begins_here)
        if not len(starts) or starts[0]:
            starts = np.append(0, starts)  # the last n-gram of the windows before goes on
        preceding = occurrences if longer is None else longer.astype(np.int64)
        found = records_of(
            self._held.dtype,
            packing.prefix(keys[starts], self._length),
            count=np.add.reduceat(occurrences, starts),
            preceding=np.add.reduceat(preceding, starts),
        )
        all_ = summed(np.concatenate((self._held, found)))
        self._held = all_[-1:].copy()
        self._take(all_[:-1])

    def close(self) -> None:
        """Takes what was held back."""
        self._take(self._held)
        self._sorter.flush()

    def _take(self, found: Records) -> None:
        first = self._packing.column(found["key"], self._length - 1) - 1
        found, first = found[first >= 0], first[first >= 0]  # shorter ones begin a document
        amounts = found["preceding"] if self._is_adjusted else found["count"]
        amounts = _unless_first(self._place, first, amounts, found["count"])
        self.counts += np.bincount(np.minimum(amounts, _DISTINGUISHED), minlength=_DISTINGUISHED + 1)[:-1]
        kept = found["count"] > self._place.settings.cutoffs[self._length - 1]
        self._sorter.add(records_of(self._dtype, self._packing.reversed(found["key"]), count=amounts, kept=kept))


def discount(place: Place, folder: Path) -> None:
    """Adds up what all parts saw."""
    parts = place.folders(ADJUST)
    unigrams, counts = (
        np.sum([load(each / f"{name}.safetensors")["counts"] for each in parts], axis=0)
        for name in ("unigrams", "counts")
    )
    save(folder / f"{DISCOUNT}.safetensors", unigrams=unigrams, counts=counts)
