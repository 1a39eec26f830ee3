"""Which chunks will the next tokens attend to? Scores of chunks from summaries of their keys.

A scorer turns a chunk's keys into one vector of features per key-value head, and queries into vectors of the same
length; their product is an estimate of the logarithm of the attention that the chunk gets, up to a constant per query.
A chunk's summary never changes, so it is made once, and scoring costs one product per chunk, not per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class ChunkStatistics(NamedTuple):
    """What is kept of the keys of chunks, each float32 [B, Hkv, C, D]. Keys are post-RoPE, as they are cached.

    Attributes:
        mean: over a chunk's tokens.
        variance: over a chunk's tokens, of each component.
        last: the key of the boundary token.
    """

    mean: Tensor
    variance: Tensor
    last: Tensor


def chunk_statistics(keys: Tensor, chunk_of: Tensor, ends: Tensor) -> ChunkStatistics:
    """Summarises chunks. Those of a row follow one another; before and behind them may stand tokens of none.

    Args:
        keys: [B, Hkv, T, D].
        chunk_of: int64 [B, T], the chunk that a token belongs to, or C if to none.
        ends: int64 [B, C], the place of each chunk's last token.
    """
    batch, heads, length, width = keys.shape
    count = ends.shape[1]
    tokens = keys.reshape(-1, width).float()
    # Of each row and head: the tokens before its chunks, the chunks, and the tokens behind them.
    lengths = chunk_of.new_zeros(batch, count + 1).scatter_add_(1, chunk_of, torch.ones_like(chunk_of))[:, :count]
    before = (ends[:, :1] - lengths[:, :1] + 1).clamp(min=0)
    starts = torch.cat((torch.zeros_like(before), before, before + lengths.cumsum(1)), 1)
    text = torch.arange(batch * heads, device=keys.device).view(batch, heads, 1)
    offsets = (text * length + starts[:, None]).flatten()
    places = torch.arange(len(tokens), device=keys.device)

    def means(values: Tensor) -> Tensor:
        return embedding_bag(places, values, offsets, mode="mean")

    mean = means(tokens)
    # About a chunk's own mean: E[x²] − E[x]² is a small difference of large numbers where keys have a bias. And what a
    # chunk gets does not depend on which others are summarised with it.
    bag = (text * (count + 2) + 1 + chunk_of[:, None]).flatten()  # tokens of no chunk may have another's mean
    variance = means((tokens - mean.index_select(0, bag)).square_())
    mean, variance = (x.view(batch, heads, count + 2, width)[:, :, 1:-1] for x in (mean, variance))
    last = tokens.index_select(0, (text * length + ends[:, None]).flatten()).view(batch, heads, count, width)
    return ChunkStatistics(mean, variance, last)


Layers = int | Sequence[int]
"""A layer, by its place in the model; or several, and then their dimension L comes first in what belongs to layers."""


class Scorer:
    """Scores chunks by features. Subclasses say what the features are, and how logits become scores.

    A class of which `takes_layers` is true is asked about several layers at once, any other layer by layer. Each class
    says so for itself, since a subclass may count on one layer.

    Attributes:
        name: in tables and errors.
        queries: how many of the last tokens' queries are averaged over.
        is_distribution: whether scores are shares of attention, so that a token's worth is its chunk's score divided
            by its length; else the scores only rank chunks.
    """

    name: str
    queries = 1
    is_distribution = True
    takes_layers = False

    def summarise(self, layer: int, keys: Tensor, chunk_of: Tensor, ends: Tensor) -> Tensor:
        """Features [B, Hkv, C, F] of chunks, from keys and places as `chunk_statistics` takes them."""
        return self.chunk_features(layer, chunk_statistics(keys, chunk_of, ends))

    def chunk_features(self, layer: int, statistics: ChunkStatistics) -> Tensor:
        """[B, Hkv, C, F] for the chunks of a layer (by its place in the model)."""
        raise NotImplementedError

    def query_features(self, layer: int, queries: Tensor) -> Tensor:
        """float32 [B, H, m, D] -> [B, H, m, F]."""
        raise NotImplementedError

    def reduce(self, layer: int, logits: Tensor, lengths: Tensor, distances: Tensor) -> Tensor:
        """Logits [B, H, m, C] to scores [B, C]: the mean over heads and queries of the softmax over chunks.

        Args:
            layer: its place in the model.
            logits: float32.
            lengths: float32 [B, C], tokens of a chunk; 0 for chunks that a row does not have.
            distances: float32 [B, C], tokens from a chunk's end to the query, at least 1.
        """
        return (logits + lengths.log()[:, None, None]).softmax(-1).mean((-3, -2))


def chunk_scores(
    scorer: Scorer, layer: Layers, queries: Tensor, features: Tensor, lengths: Tensor, distances: Tensor
) -> Tensor:
    """Scores of chunks.

    Args:
        scorer: whose features they are.
        layer: its place in the model; or those of L layers, if the scorer takes several.
        queries: [B, H, m, D], or [L, B, H, m, D], post-RoPE, oldest first.
        features: [B, Hkv, C, F], or [L, B, Hkv, C, F].
        lengths: float32 [B, C], 0 for chunks that a row does not have.
        distances: float32 [B, C], tokens from a chunk's end to the query, at least 1.

    Returns:
        float32 [B, C], or [L, B, C]; 0 or less than any other for chunks that a row does not have, NaN in rows without
        any.
    """
    *batch, heads, count, _ = queries.shape
    groups, asked = features.shape[-3], cast(Any, scorer)  # which may take several layers, if these are several
    wanted = asked.query_features(layer, queries.float())
    # In float32 whatever the model computes in: squares of queries times variances leave float16's range.
    logits = wanted.reshape(*batch, groups, heads // groups * count, -1) @ features.float().transpose(-1, -2)
    return asked.reduce(layer, logits.view(*batch, heads, count, -1), lengths, distances)


def scores_of_layers(
    scorer: Scorer, layers: Sequence[int], queries: Tensor, features: Tensor, lengths: Tensor, distances: Tensor
) -> Tensor:
    """`chunk_scores` of L layers, [L, B, C], of any scorer."""
    if _takes_layers(scorer):
        return chunk_scores(scorer, layers, queries, features, lengths, distances)
    each = zip(layers, queries, features, strict=True)
    return torch.stack([chunk_scores(scorer, *own, lengths, distances) for own in each])


def features_of_layers(scorer: Scorer, layers: Sequence[int], statistics: ChunkStatistics) -> Tensor:
    """`Scorer.chunk_features` of L layers, [L, B, Hkv, C, F], of any scorer, for statistics [L, B, Hkv, C, D]."""
    if _takes_layers(scorer):
        return cast(Any, scorer).chunk_features(layers, statistics)
    each = zip(layers, *statistics, strict=True)
    return torch.stack([scorer.chunk_features(layer, ChunkStatistics(*own)) for layer, *own in each])


def _takes_layers(scorer: Scorer) -> bool:
    return vars(type(scorer)).get("takes_layers", False)


class PooledScorer(Scorer):
    """Needs no training: the attention that a chunk would get if its keys were spread normally about their mean.

    log Σ exp(q·k/√D) over a chunk's keys is log n + q·μ/√D + q²·σ²/2D for normal keys with independent components
    (the second-order cumulant expansion). The mean key alone misses a chunk in which one token stands out; the variance
    tells of it.

    Args:
        head_dim: D of the model; with its scaling, if that is not 1/√D.
        queries: how many of the last tokens' queries are averaged over.
        scaling: of attention logits.
        use_variance: without it, the mean key alone.
    """

    name = "pooled"
    takes_layers = True

    def __init__(self, head_dim: int, queries: int = 4, scaling: float | None = None, use_variance: bool = True):
        self.scaling = head_dim**-0.5 if scaling is None else scaling
        self.queries = queries
        self.use_variance = use_variance

    def chunk_features(self, layer: Layers, statistics: ChunkStatistics) -> Tensor:
        """Mean and variance side by side: F = 2 D."""
        if not self.use_variance:
            return statistics.mean
        return torch.cat((statistics.mean, statistics.variance), -1)

    def query_features(self, layer: Layers, queries: Tensor) -> Tensor:
        """See the class."""
        scaled = queries * self.scaling
        return torch.cat((scaled, scaled.square() / 2), -1) if self.use_variance else scaled
