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


def perplexity(log_probs: Tensor) -> Tensor:
    """exp(−mean log p) over the last dimension: float [..., T] -> float [...]."""
    return (-log_probs.mean(-1)).exp()


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


def distinct_n(tokens: Sequence[int], n: int) -> float:
    """Distinct n-grams over n-grams of one text (Li et al. 2016); NaN if it has none."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def token_overlap(tokens: Sequence[int], reference: Sequence[int]) -> float:
    """Share of the tokens that the reference has, each counted as often as it has it (clipped unigram precision)."""
    if not len(tokens):
        return math.nan
    size = max(max(tokens), max(reference, default=0)) + 1
    counts = np.bincount(np.asarray(tokens), minlength=size)
    clipped = np.minimum(counts, np.bincount(np.asarray(reference, np.int64), minlength=size))
    return float(clipped.sum() / len(tokens))


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

    def overlap(self, tokens: Sequence[int]) -> float:
        """Share of the tokens whose id occurs in the corpus."""
        return float(np.isin(tokens, self._seen).mean()) if len(tokens) else math.nan

    def longest_copied_run(self, tokens: Sequence[int]) -> int:
        """Length of the longest run of consecutive tokens that stands in the corpus."""
        ids = np.asarray(tokens, np.int64)
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
