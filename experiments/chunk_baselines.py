"""What ChunkLLM's scorers are compared with, each as a selection, so that all run through the same cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from chunkllm import ChunkAdapters, ChunkSelection, PooledScorer, Scorer
from chunkllm.models import ModelShape
from chunkllm.scorers import ChunkStatistics

PAGE = 16
FIXED = 20


class _ByPlace(Scorer):
    """Needs neither queries nor keys."""

    is_distribution = False

    def chunk_features(self, layer: int, statistics: ChunkStatistics) -> Tensor:
        """One zero."""
        return torch.zeros_like(statistics.mean[..., :1])

    def query_features(self, layer: int, queries: Tensor) -> Tensor:
        """One zero."""
        return torch.zeros_like(queries[..., :1])


class RecentScorer(_ByPlace):
    """The last chunks: with sinks, StreamingLLM (arXiv 2309.17453)."""

    name = "recent"

    def reduce(self, layer: int, logits: Tensor, lengths: Tensor, distances: Tensor) -> Tensor:
        """The nearer the better."""
        return -distances


class RandomScorer(_ByPlace):
    """Any chunks."""

    name = "random"

    def __init__(self, seed: int = 0):
        self._generator = torch.Generator().manual_seed(seed)

    def reduce(self, layer: int, logits: Tensor, lengths: Tensor, distances: Tensor) -> Tensor:
        """Uniform numbers."""
        return torch.rand(lengths.shape, generator=self._generator).to(lengths.device)


class QuestScorer(Scorer):
    """An upper bound of q·k over a page's keys, from the smallest and the largest of each component (arXiv 2406.10774).

    max over the box of q·k is relu(q)·max − relu(−q)·min. Quest chooses pages for every head; here all heads of a layer
    choose together, by the mean of their softmax over pages.
    """

    name = "quest"

    def __init__(self, scaling: float):
        self._scaling = scaling

    def summarise(self, layer: int, keys: Tensor, chunk_of: Tensor, ends: Tensor) -> Tensor:
        """Largest and smallest component of each page's keys: F = 2 D."""
        batch, heads, length, width = keys.shape
        place = chunk_of[:, None, :, None].expand(batch, heads, length, width)
        room = keys.new_zeros(batch, heads, ends.shape[1] + 1, width)
        extremes = [room.scatter_reduce(2, place, keys, how, include_self=False) for how in ("amax", "amin")]
        return torch.cat(extremes, -1)[:, :, :-1]

    def query_features(self, layer: int, queries: Tensor) -> Tensor:
        """See the class."""
        scaled = queries * self._scaling
        return torch.cat((scaled.relu(), -(-scaled).relu()), -1)


@dataclass(frozen=True)
class Setting:
    """What a selection is made for.

    Attributes:
        shape: of the model.
        tokenizer: of the model.
        adapters: of the model, if there are any.
        retention: share of tokens to keep.
    """

    shape: ModelShape
    tokenizer: Any
    adapters: ChunkAdapters | None
    retention: float


def _with_boundaries(setting: Setting, scorer: Scorer | None, **options: Any) -> ChunkSelection:
    """Chunks as ChunkLLM has them; with the trained detector if there is one, whoever scores."""
    return ChunkSelection(
        setting.adapters, tokenizer=setting.tokenizer, scorer=scorer, retention=setting.retention, **options
    )


def _pooled(setting: Setting, **options: Any) -> PooledScorer:
    return PooledScorer(setting.shape.head_dim, scaling=setting.shape.scaling, **options)


FULL = "full attention"
METHODS: dict[str, Callable[[Setting], ChunkSelection]] = {
    FULL: lambda s: ChunkSelection(retention=1.0),
    "adapter, adaptive": lambda s: _with_boundaries(s, None, adaptive=True),
    "adapter": lambda s: _with_boundaries(s, None),
    "pooled, adaptive": lambda s: _with_boundaries(s, _pooled(s), adaptive=True),
    "pooled": lambda s: _with_boundaries(s, _pooled(s)),
    "pooled, one vote": lambda s: _with_boundaries(s, _pooled(s), vote=True),
    "mean keys alone": lambda s: _with_boundaries(s, _pooled(s, use_variance=False)),
    "fixed chunks (FixLLM)": lambda s: ChunkSelection(scorer=_pooled(s), retention=s.retention, max_chunk=FIXED),
    "pages (Quest)": lambda s: ChunkSelection(
        scorer=QuestScorer(s.shape.scaling), retention=s.retention, max_chunk=PAGE, every_step=True
    ),
    "sinks + recent (StreamingLLM)": lambda s: _with_boundaries(s, RecentScorer()),
    "random chunks": lambda s: _with_boundaries(s, RandomScorer()),
}
