"""N-grams as sortable integers: tokens side by side in a few 64-bit words, the most significant first."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Keys = NDArray[np.uint64]
"""[N, W], compared word by word. A place without a token is 0, and a token is its id plus one."""


class Packing:
    """How n-grams of one length lie in keys. A shorter one is the beginning of a longer one's key, behind it zeros.

    Args:
        vocab_size: number of token ids, V.
        length: n, tokens of an n-gram.

    Attributes:
        words: W, of a key.
    """

    def __init__(self, vocab_size: int, length: int):
        self.vocab_size, self.length = vocab_size, length
        self._bits = int(vocab_size).bit_length()
        self._per_word = 64 // self._bits
        self.words = -(-length // self._per_word)

    def pack(self, columns: Sequence[NDArray[np.integer]]) -> Keys:
        """Keys of n-grams, given each place's token ids plus one, int [N], the place that is compared first first."""
        keys = np.zeros((self.words, len(columns[0])), np.uint64)
        for place, column in enumerate(columns):
            word, shift = self._at(place)
            keys[word] |= column.astype(np.uint64) << shift
        return np.ascontiguousarray(keys.T)

    def column(self, keys: Keys, place: int) -> NDArray[np.int64]:
        """The token ids plus one at a place, int64 [N]."""
        word, shift = self._at(place)
        return ((keys[:, word] >> shift) & np.uint64((1 << self._bits) - 1)).astype(np.int64)

    def prefix(self, keys: Keys, length: int) -> Keys:
        """The beginnings of so many tokens, as keys of their own length."""
        shorter = Packing(self.vocab_size, length)
        return keys[:, : shorter.words] & shorter._all

    def reversed(self, keys: Keys) -> Keys:
        """Keys of the same n-grams, the last place first."""
        return self.pack([self.column(keys, place) for place in reversed(range(self.length))])

    def first(self, token: int) -> int:
        """The least first word of a key whose first token is this one."""
        return (token + 1) << int(self._at(0)[1])

    def _at(self, place: int) -> tuple[int, np.uint64]:
        word, within = divmod(place, self._per_word)
        return word, np.uint64(self._bits * (self._per_word - 1 - within))

    @cached_property
    def _all(self) -> Keys:
        """Ones at all places, [W]."""
        ones = np.array([(1 << self._bits) - 1])
        return self.pack([ones] * self.length)[0]


def order_of(keys: Keys) -> NDArray[np.int64]:
    """What sorts keys, int64 [N]; stable, and fast where they are sorted already, part by part."""
    if keys.shape[1] == 1:
        return np.argsort(keys[:, 0], kind="stable")
    return np.lexsort(keys.T[::-1])


def begins(keys: Keys, before: Keys | None = None) -> NDArray[np.bool_]:
    """Whether each of sorted keys is another than the one before it, bool [N].

    Args:
        keys: [N, W].
        before: the one that came before the first, [W]; None if none did.
    """
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(1)
    if before is not None and len(keys):
        new[0] = bool((keys[0] != before).any())
    return new


def lower_bound(keys: Keys, key: Keys) -> int:
    """How many of sorted keys are below a key, [W]."""
    return _bounds(keys, key)[0]


def upper_bound(keys: Keys, key: Keys) -> int:
    """How many of sorted keys are not above a key, [W]."""
    return _bounds(keys, key)[1]


def _bounds(keys: Keys, key: Keys) -> tuple[int, int]:
    low, high = 0, len(keys)
    for word, value in enumerate(key):
        some = np.ascontiguousarray(keys[low:high, word])
        left, right = (int(np.searchsorted(some, value, side)) for side in ("left", "right"))
        low, high = low + left, low + right
    return low, high


def places_of(wanted: Keys, keys: Keys) -> NDArray[np.int64]:
    """Where each of some keys stands among sorted distinct ones that hold it, int64 [N]."""
    if keys.shape[1] == 1:
        return np.searchsorted(keys[:, 0], wanted[:, 0])
    order = order_of(np.concatenate((keys, wanted)))
    is_key = order < len(keys)
    places = np.empty(len(order), np.int64)
    places[order] = np.cumsum(is_key) - 1
    return places[len(keys) :]
