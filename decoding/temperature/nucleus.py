"""Top-p, for rows that differ in it."""

from __future__ import annotations

import torch
from torch import Tensor


def cut_to_nucleus(scores: Tensor, top_p: Tensor) -> Tensor:
    """Rules out, in place, what is not among the likeliest tokens that have a share of ``top_p`` together.

    Holtzman et al. 2020 (arXiv 1904.09751), as vLLM and transformers compute it: from the least likely token on, those
    whose probabilities sum to no more than 1 − p are out, never the likeliest.

    Args:
        scores: float [B, V], before softmax.
        top_p: float32 [B], in (0, 1]; rows of 1 stay as they are.

    Returns:
        ``scores``.
    """
    ascending, order = scores.sort(-1)
    out = ascending.softmax(-1).cumsum(-1) <= 1 - top_p[:, None]
    out[:, -1] = False
    out &= (top_p < 1)[:, None]
    return scores.masked_fill_(torch.zeros_like(out).scatter_(-1, order, out), -torch.inf)
