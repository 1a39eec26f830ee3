"""What was read, kept on request: to look into a selection, and to draw it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from chunkllm.late import Arriving


@dataclass(frozen=True)
class Reading:
    """What a row's tokens read from a selection on, until its next.

    They also read each other, which `kept` does not tell: all that is written after a selection is read.

    Attributes:
        row: of the batch.
        length: L, places in the cache at the selection, padding included.
        kept: bool [layers, L], the places that each layer of full attention reads.
    """

    row: int
    length: int
    kept: np.ndarray


class Record:
    """Selections, kept as they are on their way from the device; nothing waits until somebody looks."""

    def __init__(self) -> None:
        self._selected: list[tuple[np.ndarray, int, list[tuple[Arriving, Arriving]]]] = []

    def add(self, rows: np.ndarray, length: int, chosen: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Takes a selection.

        Args:
            rows: int64 [n], the rows that it is for.
            length: places in the cache.
            chosen: for each layer the places, int64 [n, S], and which of them there are, bool [n, S].
        """
        layers = [(Arriving(places), Arriving(valid)) for places, valid in chosen]
        self._selected.append((rows, length, layers))

    def readings(self) -> list[Reading]:
        """One for each row of each selection, in their order."""
        found = []
        for rows, length, layers in list(self._selected):  # another thread may add some
            kept = np.zeros((len(rows), len(layers), length), bool)
            for layer, (places, valid) in enumerate(layers):
                for i in range(len(rows)):
                    kept[i, layer, places.get()[i][valid.get()[i]]] = True
            found += [Reading(row, length, of_row) for row, of_row in zip(rows.tolist(), kept, strict=True)]
        return found
