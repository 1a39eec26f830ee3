"""What ChunkLLM's scorers are compared with, each as a selection, so that all run through the same cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chunkllm import Attachment, ChunkAdapters, ChunkCalibration, ChunkSelection, PooledScorer, Scorer
from chunkllm.models import model_shape
from chunkllm.scorers import ChunkStatistics
from decoding import hooks

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


def limit_of(kept: float) -> dict[str, Any]:
    """A share of the tokens so far, up to 1, or a number of tokens, as `ChunkSelection` and results name it."""
    return {"retention": kept} if kept <= 1 else {"budget": int(kept)}


def kept_of(row: Mapping[str, Any]) -> float:
    """The reverse, of a row of results."""
    return row["retention"] if "retention" in row else row["budget"]


def kept_shown(kept: float) -> str:
    """In tables."""
    return f"{100 * kept:g} %" if kept <= 1 else f"{int(kept):,} tokens"


@dataclass(frozen=True)
class Setting:
    """What a selection is attached to.

    Attributes:
        model: a causal language model.
        tokenizer: its tokenizer.
        adapters: of the model, or its calibration, if there is one.
        kept: a share of the tokens so far, up to 1, or else so many tokens.
    """

    model: Any
    tokenizer: Any
    adapters: ChunkAdapters | ChunkCalibration | None
    kept: float

    @property
    def scaling(self) -> float:
        """Of attention logits."""
        return model_shape(self.model).scaling

    def pooled(self, **options: Any) -> PooledScorer:
        """The scorer that needs no training."""
        return PooledScorer(model_shape(self.model).head_dim, scaling=self.scaling, **options)

    def by_sentence(self, scorer: Scorer | None, **options: Any) -> Attachment:
        """Chunks as ChunkLLM has them, with the trained detector if there is one, whoever scores."""
        selection = ChunkSelection(self.adapters, scorer=scorer, **limit_of(self.kept), **options)
        return selection.attach(self.model, self.tokenizer)

    def by_length(self, scorer: Scorer, length: int, **options: Any) -> Attachment:
        """Chunks of one length."""
        selection = ChunkSelection(scorer=scorer, **limit_of(self.kept), max_chunk=length, **options)
        return selection.attach(self.model)


FULL = "full attention"
ADAPTER = "adapter"
BY_LAYER = ", by layer"
METHODS: dict[str, Callable[[Setting], Attachment]] = {
    FULL: lambda s: ChunkSelection(retention=1.0).attach(s.model),
    ADAPTER + BY_LAYER: lambda s: s.by_sentence(None, adaptive=True),
    "pooled" + BY_LAYER: lambda s: s.by_sentence(s.pooled(), adaptive=True),
    ADAPTER: lambda s: s.by_sentence(None, adaptive=False),
    ADAPTER + " at every token": lambda s: s.by_sentence(None, adaptive=False, every_step=True),
    ADAPTER + ", one vote": lambda s: s.by_sentence(None, vote=True),
    "pooled": lambda s: s.by_sentence(s.pooled(), adaptive=False),
    "mean keys alone": lambda s: s.by_sentence(s.pooled(use_variance=False), adaptive=False),
    "fixed chunks (FixLLM)": lambda s: s.by_length(s.pooled(), FIXED),
    "pages (Quest)": lambda s: s.by_length(QuestScorer(s.scaling), PAGE, every_step=True),
    "sinks + recent (StreamingLLM)": lambda s: s.by_sentence(RecentScorer(), adaptive=False),
    "sinks + recent" + BY_LAYER: lambda s: s.by_sentence(RecentScorer(), adaptive=True),
    "random chunks": lambda s: s.by_sentence(RandomScorer(), adaptive=False),
}


def all_methods() -> dict[str, Callable[[Setting], Attachment]]:
    """`METHODS`, and the scorers of other packages (`decoding.hooks.SCORERS`), with chunks as ChunkLLM has them."""
    return METHODS | {name: partial(_added, name) for name in hooks.SCORERS.names}


def _added(name: str, setting: Setting) -> Attachment:
    return setting.by_sentence(hooks.SCORERS.load(name)(model_shape(setting.model)), adaptive=False)
