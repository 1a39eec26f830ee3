"""What else might move style more at equal fluency: changes to the ratio that nobody ships, for `style compare`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor
from transformers import LogitsProcessor

from decoding.style.background import MeanDistribution, Watcher, sample
from decoding.style.bound import BoundStyle
from decoding.style.settings import Settings
from decoding.tokens import id_count
from ngram import NGramModel

LONGEST = 8
"""Tokens of context that `LongestContexts` looks for."""
BEYOND = 3
"""The shortest of them that steers: the prior has those of two tokens itself."""
LEARNT_WINDOW = 128
LEARNT_WINDOWS = 4


class SparesNames(LogitsProcessor):
    """Leaves scores as they are behind a token of a name or a number: it begins with a capital, or has a digit.

    Args:
        prior: what steers elsewhere.
        tokenizer: says what tokens are.
    """

    def __init__(self, prior: LogitsProcessor, tokenizer: Any):
        self._prior = prior
        texts = [tokenizer.decode([token]).strip() for token in range(id_count(tokenizer))]
        self._is_name = torch.tensor([text[:1].isupper() or any(map(str.isdigit, text)) for text in texts])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steers one step: int64 [B, L], float [B, W]."""
        spared = self._is_name.to(scores.device)[input_ids[:, -1]]
        return torch.where(spared[:, None], scores, self._prior(input_ids, scores))


class LongestContexts(LogitsProcessor):
    """Steers by what follows the longest context that the corpus has, of 3 to 8 tokens, and by the prior.

    To the prior's sum comes λ · w · log(1 + p(v | context) / p(v)), with p the corpus's relative frequencies and w the
    share of one of its orders. Contexts are found in a suffix array, as infini-gram does (arXiv 2401.17377).

    Args:
        prior: what steers besides.
        documents: the corpus, int64 token ids.
        tokenizer: says how many ids there are.
        strength: λ · w.
    """

    def __init__(self, prior: LogitsProcessor, documents: Sequence[np.ndarray], tokenizer: Any, strength: float):
        self._prior, self._strength = prior, strength
        gap = np.full(LONGEST, -1)  # no context spans two documents
        stream = np.concatenate([part for ids in documents for part in (gap, ids)])
        places = np.flatnonzero(stream >= 0)
        before = [stream[places - back] for back in range(1, LONGEST + 1)]
        order = np.lexsort(before[::-1])
        self._before, self._next = [tokens[order] for tokens in before], stream[places][order]
        counts = np.bincount(self._next, minlength=id_count(tokenizer))
        self._frequencies = counts / counts.sum()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Steers one step: int64 [B, L], float [B, W]."""
        steered = self._prior(input_ids, scores)
        for row, context in enumerate(input_ids[:, -LONGEST:].tolist()):
            following = self._following(context[::-1])
            tokens, counts = np.unique(following, return_counts=True)
            change = self._strength * np.log1p(counts / max(1, len(following)) / self._frequencies[tokens])
            steered[row, torch.from_numpy(tokens)] += torch.from_numpy(change).to(steered)
        return steered

    def _following(self, context: Sequence[int]) -> np.ndarray:
        """Tokens behind the places of the longest context that there is, nearest token first; none of a short one."""
        begin, end, length = 0, len(self._next), 0
        for token, column in zip(context, self._before, strict=False):
            first, last = np.searchsorted(column[begin:end], [token, token + 1])
            if first == last:
                break
            begin, end, length = begin + first, begin + last, length + 1
        return self._next[begin:end] if length >= BEYOND else self._next[:0]


def written_after(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int) -> Tensor:
    """Relative frequencies of token ids in what a model writes after these prompts, float64 [V]."""
    mean = MeanDistribution()
    torch.manual_seed(0)
    sample(model, tokenizer, prompts, tokens, [Watcher(mean.add)])
    return mean.frequencies(id_count(tokenizer))


def learnt_weights(model: Any, prior: NGramModel, log_ratio: Tensor, documents: Sequence[np.ndarray]) -> list[float]:
    """Weights of a prior's orders, of sum 1, under which held-out text of its style is likeliest with the model.

    The model's log-probabilities and each order's term are added with free weights, none negative, whose best sum is λ.
    That is left out here, to be chosen by itself.

    Args:
        model: the generating model.
        prior: n-gram model of other documents than these.
        log_ratio: the row r, float [V].
        documents: held-out ones, int64 token ids.
    """
    stream = torch.from_numpy(np.concatenate(documents))[: LEARNT_WINDOWS * LEARNT_WINDOW]
    logits, terms, labels = [], [], []
    for ids in stream.split(LEARNT_WINDOW):
        with torch.inference_mode():
            scores = model(input_ids=ids[None].to(model.device)).logits[0, :-1].float().cpu()
        logits.append(scores)
        terms.append(torch.stack([_term(prior, log_ratio, order, ids[:-1], scores) for order in _orders(prior)]))
        labels.append(ids[1:])
    scores, target, added = torch.cat(logits), torch.cat(labels), torch.cat(terms, 1)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.tensor(weights, dtype=torch.float32, requires_grad=True)
        steered = scores + torch.einsum("k,knv->nv", free, added)
        value = torch.nn.functional.cross_entropy(steered, target)
        value.backward()
        assert free.grad is not None
        return value.item(), free.grad.double().numpy()

    equal = np.full(prior.order, 1 / prior.order)
    found = minimize(loss, equal, jac=True, bounds=[(0, 2)] * prior.order, options={"maxiter": 30}).x
    return (found / found.sum() if found.any() else equal).tolist()


def _orders(prior: NGramModel) -> range:
    return range(1, prior.order + 1)


def _term(prior: NGramModel, log_ratio: Tensor, order: int, ids: Tensor, scores: Tensor) -> Tensor:
    """What an order of weight 1 adds behind each token, float32 [N, V]."""
    weights = [float(each == order) for each in _orders(prior)]
    alone = BoundStyle(prior, 1.0, Settings(mode="ratio", weights=weights, steer_stop=True), log_ratio)
    return alone.along(ids, torch.zeros_like(scores))
