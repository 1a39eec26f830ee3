"""From counts to probabilities: modified Kneser-Ney, Witten-Bell, and additive smoothing.

All three interpolate, order by order, down to a distribution that covers the whole vocabulary:

    p_k(w | h) = mass(h w) + γ(h) · p_{k−1}(w | h′),        h′ = h without its first token,

with mass(h w) = 0 for a continuation never seen, and γ(h) = 1 for a context never seen. They differ in mass and γ
alone. In logarithms, and with every continuation's *delta* against its back-off estimate,

    log p_k(w | h) = log γ(h) + log p_{k−1}(w | h′) + delta(h w),        delta = 0 if unseen,

so that a row over the vocabulary is the unigram row, plus one number, plus sparse deltas. That form is what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ngram.counts import Level
from ngram.errors import NGramError

Smoothing = Literal["kneser-ney", "witten-bell", "additive"]
Floats = NDArray[np.float64]
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)


@dataclass(frozen=True)
class Estimates:
    """A smoothed model, in natural logarithms.

    Attributes:
        unigram: log p_1 of every id, float64 [V]; −inf for ``bos_id``, which is never predicted.
        backoffs: for the contexts of length 1 … n−1, log γ, each float64 [N_k].
        deltas: for the 2- … n-grams, log p_k − (log γ + log p_{k−1}), each float64 [N_k].
    """

    unigram: Floats
    backoffs: list[Floats]
    deltas: list[Floats]


class _Terms(NamedTuple):
    mass: Floats  # of each k-gram [N_k]
    gamma: Floats  # of each (k−1)-gram as a context [N_{k−1}]; 1 where it is none


def estimate(
    levels: list[Level],
    smoothing: Smoothing,
    *,
    bos_id: int | None = None,
    pad_vocab: bool = False,
    delta: float = 0.1,
    interpolation: Sequence[float] | None = None,
) -> Estimates:
    """Smooths counted n-grams.

    Args:
        levels: from `count_ngrams`.
        smoothing: see `NGramModel.train`, which documents these parameters.
        bos_id: a context only, never predicted.
        pad_vocab: what the uniform distribution below a Kneser-Ney unigram ranges over.
        delta: the pseudo-count of additive smoothing.
        interpolation: one weight per order for additive smoothing.

    Raises:
        NGramError: an unknown smoothing, or weights that do not fit.
    """
    if smoothing not in get_args(Smoothing):
        raise NGramError(f"unknown smoothing {smoothing!r}: choose from {', '.join(get_args(Smoothing))}")
    counts = [level.counts for level in levels]
    if smoothing == "kneser-ney":
        counts = _adjusted_counts(levels, bos_id)
    counts[0] = _without_bos(counts[0], bos_id)
    widths = [1, *(len(level.words) for level in levels)]
    inputs = list(zip(levels, counts, widths, strict=False))
    if smoothing == "kneser-ney":
        terms = [_kneser_ney(*each) for each in inputs]
    elif smoothing == "witten-bell":
        terms = [_witten_bell(*each) for each in inputs]
    else:
        weights = _checked_weights(interpolation, len(levels), delta)
        terms = [_additive_unigram(counts[0], bos_id, delta)]
        terms += [_fixed(*each, weights[: k + 1]) for k, each in enumerate(inputs) if k]

    one_unknown = smoothing == "kneser-ney" and not pad_vocab
    probability = _unigram(terms[0], counts[0], bos_id, one_unknown)
    with np.errstate(divide="ignore"):
        unigram = np.log(probability)
    backoffs, deltas = [], []
    for level, (mass, gamma) in zip(levels[1:], terms[1:], strict=True):
        lower = gamma[level.parents] * probability[level.suffixes]
        probability = mass + lower
        backoffs.append(np.log(gamma))
        deltas.append(np.log(probability / lower))
    return Estimates(unigram, backoffs, deltas)


def _without_bos(counts: NDArray[np.int64], bos_id: int | None) -> NDArray[np.int64]:
    if bos_id is None:
        return counts
    counts = counts.copy()
    counts[bos_id] = 0
    return counts


def _unigram(terms: _Terms, counts: NDArray[np.int64], bos_id: int | None, one_unknown: bool) -> Floats:
    """p_1 = mass + γ · uniform. With ``one_unknown``, all unseen ids together have the share of one seen type."""
    predicted = np.ones(len(counts), bool)
    if bos_id is not None:
        predicted[bos_id] = False
    unseen = predicted & (counts == 0)
    uniform = predicted / predicted.sum()
    if one_unknown:
        seen_types = int((counts > 0).sum())
        share = 1 / (seen_types + bool(unseen.any()))
        uniform = np.where(unseen, share / max(unseen.sum(), 1), predicted * share)
    return terms.mass * predicted + terms.gamma[0] * uniform


def _totals(level: Level, values: NDArray[Any], below: int) -> Floats:
    """Sums of ``values`` over the continuations of each context, float64 [below]."""
    return np.bincount(level.parents, weights=values, minlength=below).astype(float)


def _terms(level: Level, numerators: Floats, left_over: Floats, denominators: Floats) -> _Terms:
    is_context = denominators > 0
    safe = np.where(is_context, denominators, 1.0)
    return _Terms(numerators / safe[level.parents], np.where(is_context, left_over / safe, 1.0))


def _adjusted_counts(levels: list[Level], bos_id: int | None) -> list[NDArray[np.int64]]:
    """Kneser-Ney's counts: below the highest order, the number of distinct tokens that precede.

    As in lmplz, n-grams that begin with bos_id keep their occurrences (nothing can precede them), and bos_id itself
    counts nothing. Without bos_id the start of a document counts as one more preceding token, so that no n-gram that
    was seen is left without a count.
    """
    adjusted = []
    begins_with_bos = np.zeros(len(levels[0].words), bool)
    if bos_id is not None:
        begins_with_bos[bos_id] = True
    for k, (level, longer) in enumerate(zip(levels[:-1], levels[1:], strict=True)):
        if k:
            begins_with_bos = begins_with_bos[level.parents]
        preceding = np.bincount(longer.suffixes, minlength=len(level.words))
        if bos_id is None:
            preceding = preceding + level.opens_document
        adjusted.append(np.where(begins_with_bos, level.counts, preceding))
    return [*adjusted, levels[-1].counts]


def _kneser_ney(level: Level, counts: NDArray[np.int64], below: int) -> _Terms:
    """Interpolated modified Kneser-Ney with three discounts per order (Chen & Goodman 1998, section 4.1.6)."""
    discount = np.array((0.0, *_discounts(counts)))[np.minimum(counts, 3)]
    return _terms(level, counts - discount, _totals(level, discount, below), _totals(level, counts, below))


def _discounts(counts: NDArray[np.int64]) -> tuple[float, float, float]:
    """D_i = i − (i+1) · Y · t_{i+1} / t_i with Y = t_1 / (t_1 + 2 t_2), where t_i n-grams have count i.

    Small or odd corpora give no valid discounts (0 < D_i ≤ i); they get those of ``lmplz --discount_fallback``.
    """
    t = [int((counts == i).sum()) for i in range(5)]
    if not all(t[1:4]):
        return FALLBACK_DISCOUNTS
    y = t[1] / (t[1] + 2 * t[2])
    d1, d2, d3 = (i - (i + 1) * y * t[i + 1] / t[i] for i in (1, 2, 3))
    if not (0 < d1 <= 1 and 0 < d2 <= 2 and 0 < d3 <= 3):
        return FALLBACK_DISCOUNTS
    return d1, d2, d3


def _witten_bell(level: Level, counts: NDArray[np.int64], below: int) -> _Terms:
    """γ(h) = T(h) / (c(h) + T(h)), with T(h) distinct continuations (Witten & Bell 1991, method C)."""
    types = _totals(level, counts > 0, below)
    return _terms(level, counts.astype(float), types, _totals(level, counts, below) + types)


def _fixed(level: Level, counts: NDArray[np.int64], below: int, weights: Floats) -> _Terms:
    """γ = (w_1 + … + w_{k−1}) / (w_1 + … + w_k): the mean of the orders whose context was seen, by their weights."""
    totals = _totals(level, counts, below)
    share = weights[-1] / weights.sum()
    return _terms(level, share * counts, (1 - share) * totals, totals)


def _additive_unigram(counts: NDArray[np.int64], bos_id: int | None, delta: float) -> _Terms:
    """p_1(w) = (c(w) + δ) / (N + δ V)."""
    added = delta * (len(counts) - (bos_id is not None))
    total = counts.sum() + added
    return _Terms(counts / total, np.array([added / total]))


def _checked_weights(interpolation: Sequence[float] | None, order: int, delta: float) -> Floats:
    weights = np.ones(order) if interpolation is None else np.asarray(interpolation, float)
    if weights.shape != (order,) or not np.isfinite(weights).all() or weights.min() < 0 or weights[0] <= 0:
        raise NGramError(
            f"interpolation must be {order} finite weights, none negative and the first above 0, not {interpolation}"
        )
    if not (np.isfinite(delta) and delta > 0):
        raise NGramError(f"delta must be a positive number, not {delta}")
    return weights
