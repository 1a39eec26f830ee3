"""Attention distillation: chunk attention is taught by full attention, summed over chunks (arXiv 2510.02361).

The paper has the boundary token's attention as the target. What a selection serves, though, is the chunk that follows;
so here the target is the attention that the following chunk's tokens pay to each earlier chunk.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from chunkllm.scorers import ChunkStatistics, Scorer, chunk_scores, chunk_statistics
from chunkllm.selection import Chunks, Rows, score_per_token, selectable

_BLOCK = 256


class Lesson(NamedTuple):
    """What one layer's adapters learn from one text with C chunks, at M of its boundaries.

    Attributes:
        queries: [M, H, m, D], of the last m tokens up to the boundary.
        statistics: of the chunks, each [1, Hkv, C, D].
        target: float [M, C], attention to each chunk before the boundary.
    """

    queries: Tensor
    statistics: ChunkStatistics
    target: Tensor


class Boundaries(NamedTuple):
    """The chunks of a text, and the boundaries at which something is learnt.

    Attributes:
        ends: int64 [C], each chunk's last token.
        chosen: int64 [M], numbers of the chunks that end there; none is the last.
    """

    ends: Tensor
    chosen: Tensor

    @property
    def starts(self) -> Tensor:
        """int64 [C], each chunk's first token."""
        return torch.cat((self.ends.new_zeros(1), self.ends[:-1] + 1))

    def chunks(self) -> Chunks:
        """[M, C], the chunks that have ended at each boundary."""
        number = torch.arange(len(self.ends), device=self.ends.device)
        known = number <= self.chosen[:, None]
        return Chunks(self.starts.expand_as(known), torch.where(known, self.ends - self.starts + 1, 0))

    def distances(self) -> Tensor:
        """float32 [M, C], tokens from a chunk's end to the boundary, at least 1."""
        return (self.ends[self.chosen][:, None] - self.ends + 1).clamp(min=1).float()

    def free(self, sinks: int, local: int) -> Tensor:
        """int64 [M, C], tokens of the chunks that selection decides about; 0 for those of which a part stays anyway.

        The first chunk is one of these. Its attention is nearly all the sinks', and would drown that of the others.
        """
        length = self.ends[self.chosen] + 1
        rows = Rows(torch.zeros_like(length), length, torch.full_like(length, local))
        whole = self.chunks()
        return torch.where(selectable(whole, rows, sinks).lengths == whole.lengths, whole.lengths, 0)


def make_lesson(queries: Tensor, keys: Tensor, boundaries: Boundaries, count: int, scaling: float) -> Lesson:
    """Computes the target and keeps what scorers need.

    Args:
        queries: [H, T, D], post-RoPE, of one text.
        keys: [Hkv, T, D].
        boundaries: of the text.
        count: m, queries kept for each boundary.
        scaling: of attention logits.
    """
    ends, chosen = boundaries
    last = (ends[chosen][:, None] + torch.arange(1 - count, 1, device=ends.device)).clamp(min=0)
    chunk_of = torch.searchsorted(ends, torch.arange(keys.shape[1], device=ends.device))
    statistics = chunk_statistics(keys[None], chunk_of[None], ends[None])
    target = future_attention(queries, keys, boundaries, scaling)
    return Lesson(queries[:, last].transpose(0, 1), statistics, target)


def future_attention(queries: Tensor, keys: Tensor, boundaries: Boundaries, scaling: float) -> Tensor:
    """The attention that the tokens of the next chunk pay to each chunk so far: means over tokens and heads.

    Full attention is computed for a block of queries at a time and summed over chunks at once.

    Args:
        queries: [H, T, D].
        keys: [Hkv, T, D].
        boundaries: M of them among C chunks.
        scaling: of attention logits.

    Returns:
        float32 [M, C]; rows sum to less than 1 by what the next chunk pays to itself.
    """
    ends, chosen = boundaries
    sizes = ends[chosen + 1] - ends[chosen]
    at = torch.repeat_interleave(torch.arange(len(chosen), device=ends.device), sizes)
    first = torch.repeat_interleave(ends[chosen] + 1, sizes)
    place = first + torch.arange(len(at), device=ends.device) - torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    target = torch.zeros(len(chosen), len(ends), device=ends.device)
    heads, _, width = queries.shape
    for block in torch.arange(len(at), device=ends.device).split(_BLOCK):
        asked = queries[:, place[block]].float().reshape(keys.shape[0], -1, width) * scaling
        logits = (asked @ keys.float().transpose(-1, -2)).view(heads, len(block), -1)
        later = torch.arange(logits.shape[-1], device=ends.device) > place[block][:, None]
        paid = logits.masked_fill_(later, -torch.inf).softmax(-1).mean(0)
        sums = torch.nn.functional.pad(paid.double().cumsum(-1), (1, 0))
        by_chunk = (sums[:, ends + 1] - sums[:, boundaries.starts]).float()
        target.index_add_(0, at[block], by_chunk / sizes[at[block]][:, None])
    earlier = torch.arange(len(ends), device=ends.device) <= chosen[:, None]
    return target * earlier


def lesson_scores(scorer: Scorer, layer: int, lesson: Lesson, boundaries: Boundaries) -> Tensor:
    """Scores float32 [M, C] of a lesson's chunks, by the function that decoding uses."""
    count = len(boundaries.chosen)
    features = scorer.chunk_features(layer, lesson.statistics).expand(count, -1, -1, -1)
    lengths = boundaries.chunks().lengths.float()
    return chunk_scores(
        scorer, layer, lesson.queries[:, :, -scorer.queries :], features, lengths, boundaries.distances()
    )


def distillation_loss(scores: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """KL(target ‖ scores) over the chunks that selection decides about, weighted by the attention they get in all.

    Args:
        scores: chunk attention, float32 [M, C].
        target: as `future_attention` gives it.
        free: int64 [M, C], as `Boundaries.free` gives it: where there are none, the chunk does not count.
    """
    counts = free > 0
    target = target * counts
    weight = target.sum(-1)
    share = target / weight.clamp(min=1e-9)[:, None]
    # 1e-9: chunks that get less do not matter, and their logarithm is not to.
    log_score = (scores * counts + 1e-9).log() - (scores * counts + 1e-9).sum(-1, keepdim=True).log()
    divergence = (torch.xlogy(share, share) - share * log_score).sum(-1)
    return (weight * divergence).mean()


def missing_mass(ranks: Tensor, target: Tensor, free: Tensor, budget: Tensor) -> Tensor:
    """Share of full attention that is lost when the best-ranked chunks are kept until a budget of tokens is full.

    Args:
        ranks: float [M, C].
        target: float32 [M, C].
        free: int64 [M, C], as `Boundaries.free` gives it.
        budget: [M], how many of them stay.

    Returns:
        float32 [M].
    """
    order = ranks.masked_fill(free == 0, -torch.inf).argsort(-1, descending=True)
    is_kept = free.gather(1, order).cumsum(-1) <= budget[:, None]
    return (target * (free > 0)).gather(1, order).masked_fill(is_kept, 0).sum(-1)


def missing_by_score(
    scores: Tensor, target: Tensor, boundaries: Boundaries, sinks: int, local: int, keep: float
) -> float:
    """`missing_mass` for the share ``keep`` of the tokens so far, ranked by score per token; the mean of boundaries."""
    free = boundaries.free(sinks, local)
    budget = keep * (boundaries.ends[boundaries.chosen] + 1) - sinks - local
    return float(missing_mass(score_per_token(scores, boundaries.chunks().lengths), target, free, budget).mean())
