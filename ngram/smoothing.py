"""From counts to probabilities: modified Kneser-Ney, Witten-Bell, and additive smoothing.

All three interpolate, order by order, down to a distribution that covers the whole vocabulary:

    p_k(w | h) = mass(h w) + γ(h) · p_{k−1}(w | h′),        h′ = h without its first token,

with mass(h w) = 0 for a continuation never seen, and γ(h) = 1 for a context never seen. They differ in mass and γ
alone. In logarithms, and with every continuation's *delta* against its back-off estimate,

    log p_k(w | h) = log γ(h) + log p_{k−1}(w | h′) + delta(h w),        delta = 0 if unseen,

so that a row over the vocabulary is the unigram row, plus one number, plus sparse deltas. That form is what is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, starmap
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from ngram.counts import Indices, Level
from ngram.errors import NGramError

Smoothing = Literal["kneser-ney", "witten-bell", "additive"]
Floats = NDArray[np.float64]
FALLBACK_DISCOUNTS = (0.5, 1.0, 1.5)
_AT_A_TIME = 1 << 14


@dataclass(frozen=True)
class Estimates:
    """A smoothed model, in natural logarithms.

    Attributes:
        unigram: log p_1 of every id, float64 [V]; −inf for ``bos_id``, which is never predicted.
        backoffs: for the contexts of length 1 … n−1, log γ, each float [N_k].
        deltas: for the 2- … n-grams, log p_k − (log γ + log p_{k−1}), each float [N_k].
    """

    unigram: Floats
    backoffs: list[NDArray[np.floating]]
    deltas: list[NDArray[np.floating]]


class Smoothed(NamedTuple):
    """What is left of the counts, and what they came to."""

    seen: NDArray[np.bool_]  # ids that occur [V]
    ngrams: list[tuple[Indices, Indices]]  # parents and words of the orders 2 … n, as in `Level`
    estimates: Estimates  # back-offs and deltas float32


class _Terms(NamedTuple):
    mass: Floats  # of each k-gram [N_k]
    gamma: Floats  # of each (k−1)-gram as a context [N_{k−1}]; 1 where it is none


Formula = Callable[[Indices, Indices, int], _Terms]
"""Terms from the parents of k-grams, their counts, and the number of (k−1)-grams among which the parents count."""


def estimate(
    levels: Iterator[Level],
    order: int,
    smoothing: Smoothing,
    *,
    bos_id: int | None = None,
    pad_vocab: bool = False,
    delta: float = 0.1,
    interpolation: Sequence[float] | None = None,
    prune: int | Sequence[int] = 0,
) -> Smoothed:
    """Smooths n-grams while they are counted, so that few levels are in memory at a time.

    Args:
        levels: from `count_ngrams`.
        order: number of levels.
        smoothing: see `NGramModel.train`, which documents these parameters.
        bos_id: a context only, never predicted.
        pad_vocab: what the uniform distribution below a Kneser-Ney unigram ranges over.
        delta: the pseudo-count of additive smoothing.
        interpolation: one weight per order for additive smoothing.
        prune: cut-offs.

    Raises:
        NGramError: an unknown smoothing, or weights or cut-offs that do not fit.
    """
    weights = checked_weights(smoothing, interpolation, order, delta)
    cutoffs = checked_cutoffs(prune, order)
    counted = _with_adjusted_counts(levels, bos_id) if smoothing == "kneser-ney" else map(_with_counts, levels)
    level, counts = next(counted)
    seen = level.counts > 0
    probability = unigram_of(counts, smoothing, weights, bos_id=bos_id, pad_vocab=pad_vocab, delta=delta)
    with np.errstate(divide="ignore"):
        estimates = Estimates(np.log(probability), [], [])
    ngrams: list[tuple[Indices, Indices]] = []
    kept = None
    for level, counts in counted:
        formula = formula_of(smoothing, counts_of_counts(counts), weights[: len(ngrams) + 2])
        contexts, kept = kept, _above(level.counts, cutoffs[len(ngrams) + 1])
        backoffs, deltas, probability = _smoothed(level, counts, probability, formula, kept)
        ngrams.append((_renumbered(_those(level.parents, kept), contexts), _those(level.words, kept)))
        estimates.backoffs.append(_those(backoffs, contexts))
        estimates.deltas.append(_those(deltas, kept))
        del level, counts, formula  # before the next level takes room
    return Smoothed(seen, ngrams, estimates)


Kept = NDArray[np.bool_] | None
"""Which n-grams are [N]; None if all are."""


def _above(counts: Indices, cutoff: int) -> Kept:
    return counts > cutoff if cutoff else None


def _those(values: NDArray[Any], kept: Kept) -> NDArray[Any]:
    return values if kept is None else values[kept]


def _renumbered(positions: Indices, kept: Kept) -> Indices:
    """Positions among those that are kept, of which all are."""
    return positions if kept is None else (np.cumsum(kept, dtype=positions.dtype) - 1)[positions]


def cut(mass: Floats, gamma: Floats, parents: Indices, kept: NDArray[np.bool_]) -> _Terms:
    """Terms without some n-grams: their mass is left to the order below, as ``lmplz --prune`` leaves it.

    Args:
        mass, gamma: of a formula.
        parents: of the n-grams.
        kept: whether one is.
    """
    left = gamma + np.bincount(parents, weights=np.where(kept, 0, mass), minlength=len(gamma))
    is_context = np.bincount(parents, weights=kept, minlength=len(gamma)) > 0
    return _Terms(np.where(kept, mass, 0), np.where(is_context, left, 1.0))


def unigram_of(
    counts: Indices, smoothing: Smoothing, weights: Floats, *, bos_id: int | None, pad_vocab: bool, delta: float
) -> Floats:
    """p_1 of every id, [V], given how often each counts, and what `estimate` is given."""
    counts = _without_bos(counts, bos_id)
    if smoothing == "additive":
        terms = _additive_unigram(counts, bos_id, delta)
    else:
        terms = formula_of(smoothing, counts_of_counts(counts), weights)(np.zeros_like(counts), counts, 1)
    return _unigram(terms, counts, bos_id, one_unknown=smoothing == "kneser-ney" and not pad_vocab)


def formula_of(smoothing: Smoothing, t: Sequence[int], weights: Floats) -> Formula:
    """Of an order, of which t[i] n-grams count i, up to 4, and as many weights."""
    if smoothing == "kneser-ney":
        return partial(_kneser_ney, discounts=_discounts(t))
    if smoothing == "witten-bell":
        return _witten_bell
    return partial(_fixed, weights=weights)


def _smoothed(
    level: Level, counts: Indices, below: Floats, formula: Formula, kept: Kept
) -> tuple[NDArray[np.float32], NDArray[np.float32], Floats]:
    """One order k ≥ 2, some contexts at a time.

    Args:
        level: its k-grams.
        counts: theirs, as the smoothing has them.
        below: p_{k−1} [N_{k−1}].
        formula: the smoothing.
        kept: those that are not cut off, `Kept`.

    Returns:
        log γ [N_{k−1}], the deltas [N_k], and p_k [N_k].
    """
    backoffs, deltas = np.empty(len(below), np.float32), np.empty(len(counts), np.float32)
    probability = np.empty(len(counts))
    for contexts, ngrams in _blocks(level.parents, len(below)):
        parents = level.parents[ngrams] - contexts.start
        mass, gamma = formula(parents, counts[ngrams], contexts.stop - contexts.start)
        if kept is not None:
            mass, gamma = cut(mass, gamma, parents, kept[ngrams])
        lower = gamma[parents] * below[level.suffixes[ngrams]]
        probability[ngrams] = mass + lower
        backoffs[contexts] = np.log(gamma)
        deltas[ngrams] = np.log(probability[ngrams] / lower)
    return backoffs, deltas, probability


def _blocks(parents: Indices, contexts: int) -> Iterator[tuple[slice, slice]]:
    """Slices of contexts and of their n-grams, which ``parents`` [N] sorts: about `_AT_A_TIME` n-grams each."""
    edges = sorted({0, *parents[_AT_A_TIME::_AT_A_TIME].tolist(), contexts})
    starts = np.searchsorted(parents, np.array(edges, parents.dtype)).tolist()  # of another dtype, parents were copied
    yield from zip(starmap(slice, pairwise(edges)), starmap(slice, pairwise(starts)), strict=True)


def _without_bos(counts: Indices, bos_id: int | None) -> Indices:
    if bos_id is None:
        return counts
    counts = counts.copy()
    counts[bos_id] = 0
    return counts


def _unigram(terms: _Terms, counts: Indices, bos_id: int | None, one_unknown: bool) -> Floats:
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


def _totals(parents: Indices, values: NDArray[Any], contexts: int) -> Floats:
    """Sums of ``values`` over the continuations of each context, float64 [contexts]."""
    return np.bincount(parents, weights=values, minlength=contexts).astype(float, copy=False)


def _terms(parents: Indices, numerators: Floats, left_over: Floats, denominators: Floats) -> _Terms:
    is_context = denominators > 0
    safe = np.where(is_context, denominators, 1.0)
    return _Terms(numerators / safe[parents], np.where(is_context, left_over / safe, 1.0))


def _with_counts(level: Level) -> tuple[Level, Indices]:
    return level, level.counts


def _with_adjusted_counts(levels: Iterator[Level], bos_id: int | None) -> Iterator[tuple[Level, Indices]]:
    """Kneser-Ney's counts: below the highest order, the number of distinct tokens that precede.

    As in lmplz, n-grams that begin with bos_id keep their occurrences (nothing can precede them), and bos_id itself
    counts nothing. Without bos_id the start of a document counts as one more preceding token, so that no n-gram that
    was seen is left without a count.
    """
    level = next(levels)
    begins_with_bos = level.words == (-1 if bos_id is None else bos_id)
    for longer in levels:
        preceding = np.bincount(longer.suffixes, minlength=len(level.words)).astype(level.counts.dtype)
        if bos_id is None:
            preceding += level.opens_document
        yield level, np.where(begins_with_bos, level.counts, preceding)
        begins_with_bos = begins_with_bos[longer.parents]
        level = longer
    yield level, level.counts


def _kneser_ney(parents: Indices, counts: Indices, contexts: int, discounts: Sequence[float]) -> _Terms:
    """Interpolated modified Kneser-Ney with three discounts per order (Chen & Goodman 1998, section 4.1.6)."""
    discount = np.array((0.0, *discounts))[np.minimum(counts, 3)]
    left_over, totals = _totals(parents, discount, contexts), _totals(parents, counts, contexts)
    return _terms(parents, counts - discount, left_over, totals)


def counts_of_counts(counts: Indices) -> list[int]:
    """How many count 0 to 4."""
    return [int((counts == i).sum()) for i in range(5)]


def _discounts(t: Sequence[int]) -> tuple[float, float, float]:
    """D_i = i − (i+1) · Y · t_{i+1} / t_i with Y = t_1 / (t_1 + 2 t_2), where t_i n-grams have count i.

    Small or odd corpora give no valid discounts (0 < D_i ≤ i); they get those of ``lmplz --discount_fallback``.
    """
    if not all(t[1:4]):
        return FALLBACK_DISCOUNTS
    y = t[1] / (t[1] + 2 * t[2])
    d1, d2, d3 = (i - (i + 1) * y * t[i + 1] / t[i] for i in (1, 2, 3))
    if not (0 < d1 <= 1 and 0 < d2 <= 2 and 0 < d3 <= 3):
        return FALLBACK_DISCOUNTS
    return d1, d2, d3


def _witten_bell(parents: Indices, counts: Indices, contexts: int) -> _Terms:
    """γ(h) = T(h) / (c(h) + T(h)), with T(h) distinct continuations (Witten & Bell 1991, method C)."""
    types = _totals(parents, counts > 0, contexts)
    return _terms(parents, counts.astype(float), types, _totals(parents, counts, contexts) + types)


def _fixed(parents: Indices, counts: Indices, contexts: int, weights: Floats) -> _Terms:
    """γ = (w_1 + … + w_{k−1}) / (w_1 + … + w_k): the mean of the orders whose context was seen, by their weights."""
    totals = _totals(parents, counts, contexts)
    share = weights[-1] / weights.sum()
    return _terms(parents, share * counts, (1 - share) * totals, totals)


def _additive_unigram(counts: Indices, bos_id: int | None, delta: float) -> _Terms:
    """p_1(w) = (c(w) + δ) / (N + δ V)."""
    added = delta * (len(counts) - (bos_id is not None))
    total = counts.sum() + added
    return _Terms(counts / total, np.array([added / total]))


def checked_weights(smoothing: Smoothing, interpolation: Sequence[float] | None, order: int, delta: float) -> Floats:
    """One weight per order, of which additive smoothing makes use.

    Raises:
        NGramError: an unknown smoothing, or weights or a δ that do not fit.
    """
    if smoothing not in get_args(Smoothing):
        raise NGramError(f"unknown smoothing {smoothing!r}: choose from {', '.join(get_args(Smoothing))}")
    if smoothing != "additive":
        return np.ones(order)
    weights = np.ones(order) if interpolation is None else np.asarray(interpolation, float)
    if weights.shape != (order,) or not np.isfinite(weights).all() or weights.min() < 0 or weights[0] <= 0:
        raise NGramError(
            f"interpolation must be {order} finite weights, none negative and the first above 0, not {interpolation}"
        )
    if not (np.isfinite(delta) and delta > 0):
        raise NGramError(f"delta must be a positive number, not {delta}")
    return weights


def checked_cutoffs(prune: int | Sequence[int], order: int) -> tuple[int, ...]:
    """One cut-off per order.

    Raises:
        NGramError: what is none.
    """
    given = [0, prune] if isinstance(prune, int) and order > 1 else np.ravel(prune).tolist()
    whole = all(isinstance(cutoff, int) and not isinstance(cutoff, bool) for cutoff in given)
    if not whole or not 1 <= len(given) <= order or given[0] != 0 or sorted(given) != given:
        raise NGramError(
            f"prune must be whole numbers that do not fall, at most one for each of the {order} orders, the first 0, "
            f"not {prune!r}"
        )
    return (*given, *given[-1:] * (order - len(given)))
