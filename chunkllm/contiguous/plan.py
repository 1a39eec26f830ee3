"""What is selected in one model, and what is counted while it happens: below both the hooks and the cache."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import numpy as np
from torch import Tensor

from chunkllm.contiguous.reading import Record
from chunkllm.models import ModelShape
from chunkllm.scorers import Scorer


@dataclass(frozen=True)
class Plan:
    """A selection's settings for one model; see `ChunkSelection` for what they mean."""

    owner: object  # the selection: a cache goes on with no other's
    config: Any
    shape: ModelShape
    scorer: Scorer
    top_k: int | None
    budget: int | None
    retention: float
    local: int
    sinks: int
    max_chunk: int
    weights: Tensor
    vote: bool
    every_step: bool
    offload: bool
    verify: bool

    def __deepcopy__(self, memo: dict) -> Plan:
        return self  # one for all caches that follow it, copies too


@dataclass
class Counters:
    """What happened since a selection was attached. Kept tokens are counted per layer, over rows and decode steps.

    Caches of several threads count here at once.

    Attributes:
        tried: in the lossless mode, drafted tokens that were held to the model's own.
        right: those of them that were the same.
        passes: over drafted tokens, and without any.
        record: the selections themselves, if that was asked for.
        caches: those that count here.
    """

    steps: int = 0
    boundaries: int = 0
    selections: int = 0
    total: int = 0
    tried: int = 0
    right: int = 0
    passes: int = 0
    kept: dict[int, int] = field(default_factory=dict)
    layers: tuple[int, ...] = ()
    record: Record | None = None
    caches: WeakSet = field(default_factory=WeakSet)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __deepcopy__(self, memo: dict) -> Counters:
        return self

    def join(self, cache: object) -> None:
        """Takes in a cache that counts here from now on."""
        with self.lock:
            self.caches.add(cache)

    def joined(self) -> Iterator[Any]:
        """The caches that are there now."""
        with self.lock:
            return iter(list(self.caches))

    def count(self, kept: np.ndarray, total: np.ndarray, steps: int = 1) -> None:
        """Adds decode steps: kept tokens int64 [L, B] of int64 [B], over all of them."""
        with self.lock:
            self.steps += steps
            self.total += int(total.sum())
            for layer, tokens in zip(self.layers, kept.sum(1).tolist(), strict=True):
                self.kept[layer] = self.kept.get(layer, 0) + tokens

    def add(self, *, boundaries: int = 0, selections: int = 0) -> None:
        """Adds chunks that ended, and rows that selected."""
        with self.lock:
            self.boundaries += boundaries
            self.selections += selections

    def verified(self, drafted: int, right: np.ndarray) -> None:
        """Adds a pass: its drafted tokens before the first wrong one, int64 [B], −1 for rows that do not write."""
        with self.lock:
            self.passes += 1
            self.right += int(right.clip(min=0).sum())
            self.tried += int(np.minimum(right + 1, drafted).sum())

    def totals(self) -> dict[str, Any]:
        """As `Attachment.stats` has them."""
        with self.lock:
            shares = {layer: kept / max(self.total, 1) for layer, kept in self.kept.items()}
            retention = sum(shares.values()) / len(shares) if shares else 1.0
            return {
                "kv_retention": retention,
                "read": retention * self.total,
                "held": self.total,
                "steps": self.steps,
                "boundaries": self.boundaries,
                "selections": self.selections,
                "passes": self.passes,
                "acceptance": self.right / self.tried if self.tried else None,
                "layers": shares,
            }
