"""From scores of chunks to the tokens that stay: pure functions of tensors.

A row keeps its first tokens (sinks), its last ones (the local window, never less than the running chunk), and of the
chunks between them those that score best.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where the rows of a batch stand, each int64 [B] on the device.

    Attributes:
        first: place of the first token that is no padding.
        length: places used so far, the same for all rows.
        recent: last tokens that always stay.
    """

    first: Tensor
    length: Tensor
    recent: Tensor


class Chunks(NamedTuple):
    """Chunks of the rows of a batch, each int64 [B, C] on the device; rows with fewer are filled up with length 0.

    Attributes:
        starts: place of the first token.
        lengths: tokens.
    """

    starts: Tensor
    lengths: Tensor


def selectable(chunks: Chunks, rows: Rows, sinks: int) -> Chunks:
    """What is left of the chunks without sinks and recent tokens, which stay anyway."""
    first = chunks.starts.clamp(min=(rows.first + sinks)[:, None])
    stop = (chunks.starts + chunks.lengths).clamp(max=(rows.length - rows.recent)[:, None])
    return Chunks(first, (stop - first).clamp(min=0))


def worth(scores: Tensor, lengths: Tensor) -> Tensor:
    """Scores [B, C] that are shares of attention, as shares per token: what a budget of tokens is best spent on."""
    return scores / lengths.clamp(min=1)


def choose_tokens(
    ranks: Tensor, chunks: Chunks, rows: Rows, sinks: int, slots: int, top_k: int | None = None
) -> tuple[Tensor, Tensor]:
    """The tokens that stay.

    Args:
        ranks: float [B, C]; chunks with more come first.
        chunks: what may be chosen, as `selectable` gives it.
        rows: where the rows stand.
        sinks: first tokens that always stay.
        slots: S, tokens that stay. The last chunk to fit is cut to fill them exactly.
        top_k: chunks that stay; all that fit by default.

    Returns:
        int64 [B, S], places of tokens, and bool [B, S], whether there is one: rows with no more than S tokens keep
        all, and ``top_k`` chunks may be fewer tokens than S.
    """
    lengths = chunks.lengths
    order = ranks.masked_fill(lengths == 0, -torch.inf).argsort(stable=True, dim=-1, descending=True)
    lengths = lengths.gather(1, order)
    if top_k is not None:
        lengths[:, top_k:] = 0
    ends = lengths.cumsum(-1)
    slot = torch.arange(slots, device=ranks.device).expand(len(ranks), -1)
    always = (sinks + rows.recent)[:, None]
    of_chunks = (slot - always).clamp(min=0)
    rank = torch.searchsorted(ends, of_chunks, right=True).clamp(max=max(ends.shape[1] - 1, 0))
    before = ends.gather(1, rank) - lengths.gather(1, rank)
    chosen = chunks.starts.gather(1, order.gather(1, rank)) + of_chunks - before
    from_end = (rows.length - rows.recent)[:, None] + slot - sinks
    tokens = torch.where(slot < sinks, rows.first[:, None] + slot, torch.where(slot < always, from_end, chosen))
    valid = (slot < always) | (of_chunks < ends[:, -1:])
    held = (rows.length - rows.first)[:, None]
    keeps_all = held <= slots
    tokens = torch.where(keeps_all, rows.first[:, None] + slot, tokens)
    valid = torch.where(keeps_all, slot < held, valid)
    return torch.where(valid, tokens, 0), valid


def shares_of_layers(worths: Tensor, lengths: Tensor, tokens: int) -> Tensor:
    """How a budget is best divided among layers: by taking the worthiest chunks of all layers together.

    Layers that attend to few chunks get little, diffuse ones much.

    Args:
        worths: float [L, B, C], attention per token.
        lengths: int64 [B, C], tokens that may be chosen.
        tokens: budget of a layer, on average.

    Returns:
        float [L], tokens of each layer relative to the average; their mean is 1.
    """
    layers, batch, count = worths.shape
    sizes = lengths.expand(layers, batch, count).transpose(0, 1).reshape(batch, -1)
    order = worths.transpose(0, 1).reshape(batch, -1).argsort(-1, descending=True)
    taken = sizes.gather(1, order)
    taken = (tokens * layers - (taken.cumsum(-1) - taken)).clamp(min=0).minimum(taken)
    per_layer = torch.zeros_like(sizes).scatter_(1, order, taken).view(batch, layers, count).sum((0, 2))
    return per_layer.float() / per_layer.float().mean().clamp(min=1)
