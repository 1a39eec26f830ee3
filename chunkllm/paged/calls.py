"""What an engine owes for a step: where chunks end, and each layer's keys and queries, all of it once.

Counted on the host, which makes the calls; so nothing waits for a device.
"""

from __future__ import annotations

from chunkllm.errors import ChunkError


class GapError(ChunkError):
    """A step lacked a call, or had one twice."""


class Calls:
    """Counts the calls of the step under way.

    Args:
        layers: L.

    Attributes:
        is_open: whether a step is under way. What comes while none is belongs nowhere.
        wants_keys: whether keys and queries are owed for it.
    """

    def __init__(self, layers: int):
        self._layers = layers
        self.is_open = self.wants_keys = False

    def open(self, wants_keys: bool) -> None:
        """A step begins."""
        self._ends, self._added = 0, [0] * self._layers
        self.is_open, self.wants_keys = True, wants_keys

    def close(self, is_replayed: bool = False) -> bool:
        """The step under way ends; returns whether all of it came, and none of it twice.

        Of a step that is replayed no keys and queries may have come here.
        """
        if not self.is_open:
            return False
        is_whole = self._ends == 1 and self._added == [int(self.wants_keys)] * self._layers
        is_elsewhere = is_replayed and not any(self._added)
        self.is_open = self.wants_keys = False
        return is_whole or is_elsewhere

    def note_ends(self) -> None:
        """The ends of chunks came."""
        self._ends += 1

    def add(self, layer: int) -> None:
        """Keys and queries of a layer, by number, came."""
        self._added[layer] += 1
