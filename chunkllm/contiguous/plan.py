"""What is selected in one model, and what is counted while it happens: below both the hooks and the cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Counters:
    """What happened since a selection was attached. Kept tokens are counted per layer, over rows and decode steps.

    ``record`` has the selections themselves, if that was asked for. In the lossless mode ``tried`` are drafted tokens
    that were held to the model's own, and ``right`` those that were the same.
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

    def count(self, kept: np.ndarray, total: np.ndarray, steps: int = 1) -> None:
        """Adds decode steps: kept tokens int64 [L, B] of int64 [B], over all of them."""
        self.steps += steps
        self.total += int(total.sum())
        for layer, tokens in zip(self.layers, kept.sum(1).tolist(), strict=True):
            self.kept[layer] = self.kept.get(layer, 0) + tokens

    def verified(self, drafted: int, right: np.ndarray) -> None:
        """Adds a pass: its drafted tokens before the first wrong one, int64 [B], −1 for rows that do not write."""
        self.passes += 1
        self.right += int(right.clip(min=0).sum())
        self.tried += int(np.minimum(right + 1, drafted).sum())
