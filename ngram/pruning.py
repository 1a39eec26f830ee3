"""Entropy pruning: leaves out the n-grams that a model misses least (Stolcke 1998, arXiv cs/0006025).

To leave out w behind h changes the model by the relative entropy

    D = −p(h) · { p(w|h) · [log p(w|h′) + log γ′(h) − log p(w|h)] + [log γ′(h) − log γ(h)] · (1 − Σ p(v|h)) },

where the sum goes over the tokens v that the model has behind h, and γ′(h) is what the order below weighs afterwards.
D is found once for each n-gram, in the whole model, and the least go first. One that begins a longer one stays as
long as that does. Those that stay keep their probabilities.

p(h) is what a model makes of h, token by token. Kneser-Ney's lower orders say how many contexts a token follows, and
not how often it comes, so another model serves better for that (Chelba et al. 2010).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ngram.encoding import NEVER
from ngram.layout import SortedNGrams, tables_from_estimates
from ngram.smoothing import Estimates
from ngram.tables import Tables

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_LEAST = 1e-12  # of what is left for the tokens that a context does not have
_AT_A_TIME = 1 << 17


class _Order(NamedTuple):
    """The k-grams of a model, k ≥ 2."""

    parents: Ints  # number of the first k−1 tokens among the (k−1)-grams, ascending [N_k]
    tokens: Ints  # all k [N_k, k]
    log_p: Floats  # log p_k [N_k]
    left: Floats  # 1 − Σ p(v|h) of contexts h [N_{k−1}]
    loss: Floats  # D [N_k]


def pruned(tables: Tables, ngrams: int, histories: Tables, beginning: float) -> Tables:
    """Tables with as many n-grams of two tokens and more, if there are that many.

    Args:
        tables: of one prior, on the CPU.
        ngrams: how many stay.
        histories: of which p(h) is, over the same vocabulary.
        beginning: log-probability of what can only begin a document.
    """
    orders = _orders(tables, histories, beginning)
    if not orders:
        return tables
    kept = _kept(orders, ngrams)
    return _without_the_rest(tables, orders, kept)


def _orders(tables: Tables, histories: Tables, beginning: float) -> list[_Order]:
    starts, backoffs = tables.starts().numpy().astype(np.int64), tables.backoffs().double().numpy()
    words, deltas = tables.token_ids(tables.words).numpy(), tables.deltas.double().numpy()
    tokens = np.arange(tables.vocab_size)[:, None]
    unigram = histories.unigram[0, : tables.vocab_size].double().numpy()
    chain = np.where(unigram <= NEVER / 2, beginning, unigram)  # log p(h) of the contexts
    orders = []
    for k in range(2, tables.order + 1):
        first, length = tables.first_nodes[k - 2], tables.lengths[k - 2]
        parents = np.repeat(np.arange(length), np.diff(starts[first : first + length + 1]))
        here = slice(starts[first], starts[first + length])
        tokens = np.concatenate((tokens[parents], words[here, None]), 1)
        lower, log_gamma = _scores(tables, tokens[:, 1:]), backoffs[first : first + length]
        log_p = deltas[here] + log_gamma[parents] + lower
        rest = _rest(parents, lower, length)
        left = np.exp(log_gamma) * rest
        log_gamma_after = np.log((left[parents] + np.exp(log_p)) / (rest[parents] + np.exp(lower)))
        change = np.exp(log_p) * (lower + log_gamma_after - log_p)
        change += (log_gamma_after - log_gamma[parents]) * left[parents]
        orders.append(_Order(parents, tokens, log_p, left, -np.exp(chain[parents]) * change))
        chain = chain[parents] + (log_p if histories is tables else _scores(histories, tokens))
    return orders


def _scores(tables: Tables, tokens: Ints) -> Floats:
    """log p of the last token behind the others, [N], of tokens [N, any]."""
    parts = [tables.score(some[:, :-1], some[:, -1]) for some in torch.from_numpy(tokens).split(_AT_A_TIME)]
    return torch.cat(parts).double().numpy() if parts else np.zeros(0)


def _rest(parents: Ints, lower: Floats, contexts: int) -> Floats:
    """1 − Σ p(v|h′) over the tokens v that each context h has, [contexts]."""
    return np.maximum(1 - np.bincount(parents, weights=np.exp(lower), minlength=contexts), _LEAST)


def _kept(orders: Sequence[_Order], ngrams: int) -> list[NDArray[np.bool_]]:
    """Which n-grams stay, order by order: with the highest losses, their own or that of one that they begin."""
    losses = [order.loss.copy() for order in orders]
    for k in range(len(orders) - 1, 0, -1):
        np.maximum.at(losses[k - 1], orders[k].parents, losses[k])
    together = np.concatenate(losses)
    lengths = np.repeat(np.arange(len(losses)), [len(loss) for loss in losses])
    kept = np.zeros(len(together), bool)
    kept[np.lexsort((lengths, -together))[:ngrams]] = True  # of equal ones the shorter, which may begin the longer
    return np.split(kept, np.cumsum([len(loss) for loss in losses])[:-1])


def _without_the_rest(tables: Tables, orders: Sequence[_Order], kept: Sequence[NDArray[np.bool_]]) -> Tables:
    seen = tables.seen[0].numpy()
    unigram = tables.unigram[0, : tables.vocab_size].double().numpy()
    ngrams: list[SortedNGrams] = []
    estimates = Estimates(unigram, [], [])
    numbers, contexts = np.arange(tables.vocab_size), np.ones(tables.vocab_size, bool)
    for order, stays in zip(orders, kept, strict=True):
        below = tables_from_estimates(seen, ngrams, estimates)
        parents, tokens, log_p = numbers[order.parents[stays]], order.tokens[stays], order.log_p[stays]
        gone = np.bincount(order.parents[~stays], weights=np.exp(order.log_p[~stays]), minlength=len(contexts))
        lower = _scores(below, tokens[:, 1:])
        count = int(contexts.sum())
        log_gamma = np.log((order.left + gone)[contexts] / _rest(parents, lower, count))
        log_gamma[np.bincount(parents, minlength=count) == 0] = 0
        ngrams.append(SortedNGrams(parents, tokens[:, -1]))
        estimates.backoffs.append(log_gamma)
        estimates.deltas.append(log_p - log_gamma[parents] - lower)
        numbers, contexts = np.cumsum(stays) - 1, stays
    return tables_from_estimates(seen, ngrams, estimates)
