"""From scores of chunks to the tokens that stay: pure functions of tensors.

A row keeps its first tokens (sinks), its last ones (the local window, never less than the running chunk), and of the
chunks between them those that score best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

DEFAULT_BUDGET = 2048
DEFAULT_LOCAL, DEFAULT_SINKS = 64, 4
_LEAST_WEIGHT = 0.5


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


def score_per_token(scores: Tensor, lengths: Tensor) -> Tensor:
    """Scores [B, C] that are shares of attention, as shares per token: what a budget of tokens is best spent on."""
    return scores / lengths.clamp(min=1)


def choose_tokens(
    ranks: Tensor,
    chunks: Chunks,
    rows: Rows,
    sinks: int,
    slots: int,
    top_k: int | None = None,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The tokens that stay.

    Args:
        ranks: float [B, C]; chunks with more come first.
        chunks: what may be chosen, as `selectable` gives it.
        rows: where the rows stand.
        sinks: first tokens that always stay.
        slots: S, tokens that stay. The last chunk to fit is cut to fill them exactly.
        top_k: chunks that stay; all that fit by default.
        limits: int64 [B], tokens that stay of a row, no more than S; S by default.

    Returns:
        int64 [B, S], places of tokens, and bool [B, S], whether there is one: rows with no more tokens than may stay
        keep all, and ``top_k`` chunks may be fewer.
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
    keeps_all = held <= (slots if limits is None else limits[:, None])
    tokens = torch.where(keeps_all, rows.first[:, None] + slot, tokens)
    valid = torch.where(keeps_all, slot < held, valid)
    if limits is not None:
        valid = valid & (slot < limits[:, None])
    return torch.where(valid, tokens, 0), valid


def layer_weights(sensitivity: Sequence[float]) -> Tensor:
    """In what proportion layers should share a budget, float64 [L] with mean of about 1.

    If a layer that keeps the share x does the damage s/x, the sum of damages is least for x proportional to √s. No
    layer gets much less than the average: what one does when alone says little of what many do together.

    Args:
        sensitivity: s, damage of each layer when it alone selects, at the same x.
    """
    roots = torch.tensor(sensitivity, dtype=torch.float64).sqrt()
    return (roots / roots.mean().clamp(min=1e-12)).clamp(min=_LEAST_WEIGHT)


def divide(tokens: Tensor, weights: Tensor, most: Tensor) -> Tensor:
    """Divides budgets among layers: in proportion to weights, but no layer gets more than it can use.

    Args:
        tokens: int64 [B], for a layer, on average. Blocks of tokens do as well.
        weights: float [L], above 0.
        most: int64 [B], what a layer can use; what is beyond, the others share.

    Returns:
        int64 [B, L]; the mean of a row is ``tokens``, but for rounding down.
    """
    order = weights.double().sort(descending=True)
    lasting = order.values.flip(0).cumsum(0).flip(0)  # of the layers that are left when the first k have the most
    full = torch.arange(len(weights), device=weights.device)
    left = tokens[:, None] * len(weights) - full * most[:, None]
    unit = left / lasting
    fits = unit * order.values <= most[:, None]
    unit = unit.gather(1, fits.int().argmax(1, keepdim=True))  # of the first k that does
    shares = (unit * weights.double()).minimum(most[:, None].double())
    enough = (tokens >= most)[:, None]
    return torch.where(enough, tokens[:, None], (shares + 1e-9).long())
