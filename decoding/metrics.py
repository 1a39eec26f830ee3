"""What a sweep measures, on tensors. Probabilities are natural: entropies and divergences are in nats."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LN2 = math.log(2)


def token_log_probs(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits) at the chosen tokens.

    Args:
        logits: float [..., V].
        tokens: int64 [...].

    Returns:
        float32 [...].
    """
    logits = logits.float()
    return logits.gather(-1, tokens[..., None])[..., 0] - logits.logsumexp(-1)


def mean_nll(log_probs: Tensor) -> Tensor:
    """−(1/T) Σ log p over the last dimension, whose exponential is the perplexity: float [..., T] -> float [...]."""
    return -log_probs.mean(-1)


def entropy(logits: Tensor) -> Tensor:
    """H(p) = −Σ p log p of p = softmax(logits), in nats: float [..., V] -> float32 [...]."""
    log_p = logits.float().log_softmax(-1)
    p = log_p.exp()
    return -torch.where(p > 0, p * log_p, 0).sum(-1)


def jensen_shannon(logits: Tensor, other: Tensor) -> Tensor:
    """JS(p, q) = ½ KL(p‖m) + ½ KL(q‖m) with m = ½ (p + q), in nats; 0 if p = q, at most ln 2.

    Args:
        logits: of p, float [..., V]; −inf where p is 0.
        other: of q, float [..., V].

    Returns:
        float32 [...].
    """
    log_p, log_q = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - LN2
    total = torch.zeros(log_p.shape[:-1], device=log_p.device)
    for log_x in (log_p, log_q):
        x = log_x.exp()
        total += torch.where(x > 0, x * (log_x - log_m), 0).sum(-1) / 2
    return total.clamp_(0, LN2)


def distinct_n(tokens: Tensor, n: int) -> float:
    """Distinct n-grams over n-grams of one text (Li et al. 2016), int64 [T]; NaN if it has none."""
    if len(tokens) < n:
        return math.nan
    grams = tokens.unfold(0, n, 1)
    return len(grams.unique(dim=0)) / len(grams)


def token_overlap(tokens: Tensor, reference: Tensor) -> float:
    """Clipped unigram precision: the share of a text's tokens that the reference has, each as often as it has it.

    Args:
        tokens: int64 [T]; NaN if there are none.
        reference: int64 [R].
    """
    if not len(tokens):
        return math.nan
    size = int(torch.cat((tokens, reference)).max()) + 1
    shared = torch.minimum(tokens.bincount(minlength=size), reference.bincount(minlength=size))
    return int(shared.sum()) / len(tokens)


class CorpusIndex:
    """What texts share with a corpus.

    Runs of tokens are compared by 64-bit polynomial hashes, sorted once for each length that some text asks for.

    Args:
        documents: the corpus as int64 token ids; no run spans two of them.
    """

    _BASE = np.uint64(0x9E3779B97F4A7C15)

    def __init__(self, documents: Sequence[np.ndarray]):
        breaks = -1 - np.arange(len(documents))  # no text has these ids, so no run crosses them
        self._stream = np.concatenate([part for i, ids in enumerate(documents) for part in (ids, breaks[i : i + 1])])
        self._seen = np.unique(self._stream)
        self._hashes: list[np.ndarray] = []

    def overlap(self, tokens: Tensor) -> float:
        """Share of a text's tokens, int64 [T], whose id occurs in the corpus; NaN if there are none."""
        return float(np.isin(tokens.cpu().numpy(), self._seen).mean()) if len(tokens) else math.nan

    def longest_copied_run(self, tokens: Tensor) -> int:
        """Length of the longest run of consecutive tokens of a text, int64 [T], that stands in the corpus."""
        ids = tokens.cpu().numpy()
        length = 0
        while length < len(ids) and _any_in(_run_hashes(ids, length + 1), self._corpus_hashes(length + 1)):
            length += 1
        return length

    def _corpus_hashes(self, length: int) -> np.ndarray:
        while len(self._hashes) < length:
            self._hashes.append(np.sort(_run_hashes(self._stream, len(self._hashes) + 1)))
        return self._hashes[length - 1]


def _any_in(values: np.ndarray, ordered: np.ndarray) -> bool:
    at = np.searchsorted(ordered, values)
    return bool((ordered[np.minimum(at, len(ordered) - 1)] == values).any())


def _run_hashes(ids: np.ndarray, length: int) -> np.ndarray:
    """Σ_i (id_i + 2⁴⁰) · b^i modulo 2⁶⁴ of every run of ``length`` ids, uint64 [T − length + 1]."""
    total = np.zeros(len(ids) - length + 1, np.uint64)
    shifted = ids.astype(np.uint64) + np.uint64(1 << 40)
    for i in range(length):
        total = total * CorpusIndex._BASE + shifted[i : i + len(total)]
    return total
