"""Where chunks begin and end, kept on the host."""

from __future__ import annotations

import numpy as np


class ChunkTable:
    """The chunks of every row of a batch.

    Args:
        first: int64 [B], place of each row's first token that is no padding.
        max_chunk: a chunk ends when it has so many tokens, whether a boundary was detected or not.
        sinks: first tokens that are a chunk of their own, since they draw attention for another reason than the rest.

    Attributes:
        lengths: int64 [B], places of each row that the table knows of.
        counts: int64 [B], chunks of each row.
    """

    def __init__(self, first: np.ndarray, max_chunk: int, sinks: int = 0):
        self.first = first.astype(np.int64)
        self.max_chunk = max_chunk
        self.sinks = sinks
        self.lengths = np.zeros(len(first), np.int64)
        self.counts = np.zeros(len(first), np.int64)
        self._ends = np.zeros((len(first), 64), np.int64)

    @property
    def length(self) -> int:
        """Places of the longest row."""
        return int(self.lengths.max(initial=0))

    def extend(self, flags: np.ndarray, counts: np.ndarray | None = None) -> np.ndarray:
        """Adds tokens.

        Args:
            flags: bool [B, T], was a boundary detected?
            counts: int64 [B], how many of them a row gets, from the first on; all by default.

        Returns:
            bool [B], does a chunk end at the last one?
        """
        for row, marks in enumerate(flags):
            length = int(self.lengths[row])
            marks = marks if counts is None else marks[: counts[row]]
            last_sink = self.first[row] + self.sinks - 1 - length
            is_end = marks | (np.arange(len(marks)) == (last_sink if self.sinks else -1))
            places = np.flatnonzero(is_end) + length
            self._append(row, places[places >= self.first[row]], length + len(marks))
            self.lengths[row] += len(marks)
        return self.running == 0

    def _append(self, row: int, detected: np.ndarray, stop: int) -> None:
        """Detected boundaries, and those that are due where a chunk would grow too long."""
        start = self._next_start(row)
        ends: list[int] = []
        for end in (*detected.tolist(), stop):
            ends += range(start + self.max_chunk - 1, end, self.max_chunk)
            if end < stop:
                ends.append(end)
            start = ends[-1] + 1 if ends else start
        count = int(self.counts[row])
        if count + len(ends) > self._ends.shape[1]:
            room = np.zeros((len(self._ends), max(count + len(ends), self._ends.shape[1] * 3 // 2)), np.int64)
            room[:, : self._ends.shape[1]] = self._ends
            self._ends = room
        self._ends[row, count : count + len(ends)] = ends
        self.counts[row] += len(ends)

    def _next_start(self, row: int) -> int:
        count = self.counts[row]
        return int(self._ends[row, count - 1]) + 1 if count else int(self.first[row])

    @property
    def running(self) -> np.ndarray:
        """int64 [B], tokens of the chunk that has not ended yet."""
        starts = np.array([self._next_start(row) for row in range(len(self.first))])
        return np.maximum(self.lengths - starts, 0)

    def spans(self, since: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Starts and lengths, int64 [B, C], of the chunks from number ``since`` [B] on; filled up with length 0."""
        since = np.zeros_like(self.counts) if since is None else since
        column = since[:, None] + np.arange(max(int((self.counts - since).max()), 0))
        known = column < self.counts[:, None]
        ends = np.take_along_axis(self._ends, np.minimum(column, self._ends.shape[1] - 1), 1)
        before = np.take_along_axis(self._ends, np.clip(column - 1, 0, self._ends.shape[1] - 1), 1)
        starts = np.where(column == 0, self.first[:, None], before + 1)
        return np.where(known, starts, 0), np.where(known, ends - starts + 1, 0)

    def longest(self, count: int) -> np.ndarray:
        """int64 [B], tokens in a row's ``count`` longest chunks."""
        _, lengths = self.spans()
        return np.sort(lengths, 1)[:, ::-1][:, :count].sum(1)

    def take_rows(self, rows: np.ndarray) -> None:
        """Reorders, repeats or drops rows."""
        self.first, self.lengths = self.first[rows], self.lengths[rows]
        self.counts, self._ends = self.counts[rows], self._ends[rows]

    def truncate(self, length: int) -> None:
        """Forgets tokens from place ``length`` on."""
        for row in range(len(self.first)):
            self.counts[row] = np.searchsorted(self._ends[row, : self.counts[row]], length)
        self.lengths = np.minimum(self.lengths, length)
