"""Search among a node's continuations, for whole batches, on any device."""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor

FEW_PROBES = 1 << 15


def search(words: Tensor, starts: Tensor, ends: Tensor, wanted: Tensor, widest: int) -> tuple[Tensor, Tensor]:
    """Where each word stands among those from its start to its end, and whether it is there.

    A search in wide steps, since few operations count: for a batch of rows, two rounds of about √widest probes. For
    many rows the probes count, and there are more rounds of fewer.

    Args:
        words: int [M], ascending from each start to its end.
        starts, ends: int [N].
        wanted: int64 [N].
        widest: upper bound of ends − starts.

    Returns:
        int64 [N], 0 where the word is missing, and bool [N].
    """
    wanted, ends = wanted[:, None], ends[:, None]
    begin = starts[:, None].to(torch.int64)
    size = max(widest, 1)
    root = isqrt(size - 1) + 1
    branches = root if root * len(wanted) <= FEW_PROBES else 4
    while size > branches:
        step = -(-size // branches)
        probes = begin + torch.arange(step, size, step, device=begin.device)
        reached = (_words_at(words, probes) <= wanted) & (probes < ends)
        begin = torch.add(begin, reached.sum(1, keepdim=True), alpha=step)
        size = step
    probes = begin + torch.arange(size, device=begin.device)
    found, at = ((_words_at(words, probes) == wanted) & (probes < ends)).max(1)
    return (begin[:, 0] + at) * found, found


def _words_at(words: Tensor, positions: Tensor) -> Tensor:
    last = max(len(words) - 1, 0)
    words = words if len(words) else words.new_zeros(1)
    return words.index_select(0, positions.clamp(max=last).view(-1)).view(positions.shape)
