"""The batched look-up: every row's prior over the whole vocabulary, added to a batch of scores in one go.

A row of log p(· | h) is the unigram row, plus one number, plus sparse deltas (see `ngram.smoothing`). So the prior of
a batch costs one dense multiply-add of the scores' shape and one scatter of the continuations seen after each
context. Nothing of the vocabulary's size is computed per order, no Python loop runs over rows, and on an accelerator
nothing waits for the host: shapes depend on the tables and the batch size alone, so a CUDA graph can record it.

Contexts form a trie laid out as in `ngram.counts`. A *node* is a context: nodes of length 1 are the token ids, nodes
of length l are sorted by (node of the first l−1 tokens, last token). Every length ends on one empty node, which
stands for "not a context of this model" and has no continuations. One more comes first of all: token −1, "no token".

Written for few and cheap operations: at batch 8 a tensor operation costs about as much to start as to carry out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ngram.smoothing import Estimates

NEVER = -1e30
"""Log-probability of what cannot occur. Finite, so that a weight of 0 leaves scores as they are (0 · −inf is NaN)."""
NO_KEY = torch.iinfo(torch.int64).max
SMALL_VOCAB = 1 << 16
SMALL_BIAS = 1 << 15


class Contexts(NamedTuple):
    """What precedes each row, for the orders 2 … n: row by row, shortest context first."""

    nodes: Tensor  # int64 [B · (n−1)], numbered over all lengths
    counts: Tensor  # int32 [B · (n−1)], number of the node's continuations; 0 where the model lacks the context
    ends: Tensor  # int32 [B · (n−1)], one past the last of them
    backoffs: Tensor  # float32 [B · (n−1)], log γ


@dataclass(frozen=True, eq=False)
class Tables:
    """A smoothed n-gram model of order n as flat tensors.

    Attributes:
        unigram: log p_1, float32 [V].
        seen: ids that the corpus or the ARPA file holds, bool [V].
        nodes: of every node, the number of its continuations, one past the last of them, and the bits of the float32
            log γ; int32 [C, 3].
        words: the continuations' ids, ascending within a node: as int16, less 32,768, if V ≤ 65,536, else int32 [N].
        deltas: log p_k(w | h) − log γ(h) − log p_{k−1}(w | h′) of each continuation, float32 [N].
        lengths: number of nodes of each context length 1 … n−1, the empty one not counted.
    """

    unigram: Tensor
    seen: Tensor
    nodes: Tensor
    words: Tensor
    deltas: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def order(self) -> int:
        """Length of the longest n-gram."""
        return len(self.lengths) + 1

    @cached_property
    def vocab_size(self) -> int:
        """Number of token ids, V."""
        return self.unigram.numel()

    @cached_property
    def stride(self) -> int:
        """Keys are node · stride + token. One more than V, so that −1 and V, no tokens, are no other node's tokens."""
        return self.vocab_size + 1

    @cached_property
    def word_bias(self) -> int:
        """What to add to a stored word."""
        return SMALL_BIAS if self.words.dtype == torch.int16 else 0

    @property
    def backoff(self) -> Tensor:
        """log γ of every node, float32 [C]."""
        return self.nodes[:, 2].view(torch.float32)

    @cached_property
    def first_nodes(self) -> tuple[int, ...]:
        """Number of the first node of each context length."""
        return tuple(np.cumsum((1, *(count + 1 for count in self.lengths)))[:-1].tolist())

    @cached_property
    def first_ngrams(self) -> tuple[int, ...]:
        """Position in ``words`` of the first 2-, 3- … n-gram, and the end."""
        empty_nodes = [first + count for first, count in zip(self.first_nodes, self.lengths, strict=True)]
        return (0, *self.nodes[empty_nodes, 1].tolist())

    @cached_property
    def node_keys(self) -> tuple[Tensor, ...]:
        """For each length 2 … n−1, the key of every node (see `ngram_keys`)."""
        return tuple(self.ngram_keys(k) for k in range(2, self.order))

    @cached_property
    def most_continuations(self) -> int:
        """The most continuations that one row's contexts can have, all orders together."""
        spans = zip(self.first_nodes, self.lengths, strict=True)
        return sum(int(self.nodes[first : first + count + 1, 0].max()) for first, count in spans)

    def ngram_keys(self, k: int) -> Tensor:
        """The key of every k-gram, nodes counted within their length: ascending int64 [N_k + 1], `NO_KEY` last."""
        first, count = self.first_nodes[k - 2], self.lengths[k - 2]
        begin, end = self.first_ngrams[k - 2], self.first_ngrams[k - 1]
        parents = torch.repeat_interleave(self.nodes[first : first + count, 0], output_size=end - begin)
        keys = parents.to(torch.int64) * self.stride + self.token_ids(self.words[begin:end])
        return torch.cat((keys, keys.new_tensor([NO_KEY])))

    def token_ids(self, words: Tensor) -> Tensor:
        """Stored words as int64 ids."""
        return words.to(torch.int64) + self.word_bias

    def to(self, device: torch.device | str) -> Tables:
        """The same tables on another device."""
        names = ("unigram", "seen", "nodes", "words", "deltas")
        moved = replace(self, **{name: getattr(self, name).to(device) for name in names})
        # The host needs these: read now, not in a step, where the device would have to be waited for.
        vars(moved).update(
            first_ngrams=self.first_ngrams,
            most_continuations=self.most_continuations,
            _first_node_row=self._first_node_row.to(device),
        )
        return moved

    def unigram_row(self, width: int) -> Tensor:
        """log p_1, then that of the least probable token up to ``width`` columns: float32 [width]."""
        if width not in self._unigram_rows:
            floor = self.unigram.masked_fill(self.unigram == NEVER, 0).min()
            self._unigram_rows[width] = torch.cat((self.unigram, floor.expand(width - self.vocab_size)))
        return self._unigram_rows[width]

    @cached_property
    def _unigram_rows(self) -> dict[int, Tensor]:
        return {self.vocab_size: self.unigram}

    @cached_property
    def _first_node_row(self) -> Tensor:
        return torch.tensor(self.first_nodes, device=self.nodes.device)

    def find(self, history: Tensor) -> Contexts:
        """Looks up the last 1 … n−1 tokens of each row.

        Args:
            history: token ids, int64 [B, H]; −1 where there is no token. Ids from V on match nothing.
        """
        longest = self.order - 1
        window = history[:, -longest:].clamp(max=self.vocab_size)
        if window.shape[1] < longest:
            window = torch.nn.functional.pad(window, (longest - window.shape[1], 0), value=-1)
        starting = window  # the nodes that begin at each position, counted within their length, which is 1 at first
        found = [starting[:, -1]]
        for length, keys in enumerate(self.node_keys, start=2):
            starting = _look_up(keys, torch.add(window[:, length - 1 :], starting[:, :-1], alpha=self.stride))
            found.append(starting[:, -1])
        nodes = torch.stack(found, 1).add_(self._first_node_row).view(-1)
        counts, ends, backoffs = self.nodes.index_select(0, nodes).unbind(1)
        return Contexts(nodes, counts, ends, backoffs.view(torch.float32))

    def score(self, history: Tensor, tokens: Tensor) -> Tensor:
        """log p of one token per row, without building rows over the vocabulary.

        Args:
            history: int64 [B, H], as in `find`.
            tokens: int64 [B], in [0, V).

        Returns:
            float32 [B].
        """
        total = self.unigram[tokens]
        if self.order == 1:
            return total
        contexts = self.find(history)
        total = total + contexts.backoffs.view(len(tokens), -1).sum(1)
        nodes = contexts.nodes.view(len(tokens), -1)
        for k, first in enumerate(self.first_nodes, start=2):
            keys = self.node_keys[k - 2] if k < self.order else self._last_keys
            at = _look_up(keys, (nodes[:, k - 2] - first) * self.stride + tokens)
            begin, end = self.first_ngrams[k - 2], self.first_ngrams[k - 1]
            if begin < end:
                deltas = self.deltas[begin:end][at.clamp(max=end - begin - 1)]
                total = total + deltas.masked_fill_(at == end - begin, 0)
        return total

    def ngram_index(self, ids: Tensor) -> Tensor:
        """Which k-gram each row is, counted within order k, or −1 if the model lacks it.

        Args:
            ids: int64 [N, k ≤ n], in [0, V).

        Returns:
            int64 [N].
        """
        index = ids[:, 0]
        for k in range(2, ids.shape[1] + 1):
            keys = self.ngram_keys(k)
            index = _look_up(keys, index * self.stride + ids[:, k - 1])
            index = index.masked_fill(index == keys.numel() - 1, -1)
        return index

    @cached_property
    def _last_keys(self) -> Tensor:
        return self.ngram_keys(self.order)


def _look_up(keys: Tensor, wanted: Tensor) -> Tensor:
    """Index of each wanted key, or of the `NO_KEY` that ends ``keys``."""
    at = torch.searchsorted(keys, wanted)
    hit = keys.index_select(0, at.view(-1)).view(at.shape) == wanted
    return at.where(hit, keys.numel() - 1)


class SortedNGrams(NamedTuple):
    """The k-grams of one order k ≥ 2, sorted by (index of the first k−1 tokens in their order, last token)."""

    parents: NDArray[np.int64]  # that index [N]
    words: NDArray[np.int64]  # that token [N]


def tables_from_estimates(seen: NDArray[np.bool_], ngrams: Sequence[SortedNGrams], estimates: Estimates) -> Tables:
    """Lays a smoothed model out as `Tables`, on the CPU.

    Args:
        seen: ids that occur, bool [V].
        ngrams: of the orders 2 … n.
        estimates: of the same.
    """
    vocab_size = len(seen)
    lengths = (vocab_size, *(len(each.words) for each in ngrams))[: len(ngrams)]
    backoff: list = [[0.0]]
    counts: list = [[0]]
    for length, gamma, longer in zip(lengths, estimates.backoffs, ngrams, strict=True):
        backoff += [gamma, [0.0]]
        counts.append(np.bincount(longer.parents, minlength=length + 1))
    words = _joined([each.words for each in ngrams], np.int64)
    small = vocab_size <= SMALL_VOCAB
    return Tables(
        unigram=torch.from_numpy(np.maximum(estimates.unigram, NEVER).astype(np.float32)),
        seen=torch.from_numpy(seen),
        nodes=pack_nodes(torch.from_numpy(_joined(counts, np.int64)), torch.from_numpy(_joined(backoff, np.float32))),
        words=torch.from_numpy((words - SMALL_BIAS).astype(np.int16) if small else words.astype(np.int32)),
        deltas=torch.from_numpy(_joined(estimates.deltas, np.float32)),
        lengths=lengths,
    )


def _joined(parts: list, dtype: type) -> np.ndarray:
    return np.concatenate(parts).astype(dtype) if parts else np.zeros(0, dtype)


def pack_nodes(counts: Tensor, backoff: Tensor) -> Tensor:
    """`Tables.nodes` from the number of continuations (int [C]) and log γ (float32 [C]) of every node."""
    return torch.stack((counts.to(torch.int32), counts.cumsum(0).to(torch.int32), backoff.view(torch.int32)), 1)


def mixture_of_orders(weights: Sequence[float]) -> Tensor:
    """The ``mixture`` of `add_log_prior` for the prior Σ_k w_k log p_k: float32 [n, n], row k for order k.

    log p_k contains the terms (log γ and delta) of all orders up to k, so order k gives w_k to each of those.
    """
    return torch.tensor(weights, dtype=torch.float32)[:, None].expand(-1, len(weights)).tril()


def add_log_prior(
    tables: Tables, scores: Tensor, history: Tensor, strength: Tensor, mixture: Tensor | None = None
) -> Tensor:
    """scores + strength · log prior, for every row of a batch.

    The prior of a row is log p_n(· | h), or, with ``mixture``, Σ_k w_k log p_k(· | h) over the orders k whose context
    is in the model. Entries at −inf stay there. Columns from V on belong to no token: they get what the least probable
    token gets, so that they never gain on any.

    Args:
        tables: the model, on the device of ``scores``.
        scores: float [B, V' ≥ V]; left untouched.
        history: token ids, int64 [B, H]; −1 where there is no token.
        strength: λ of each row, float32 [B]. Rows with 0 come back as they are.
        mixture: from `mixture_of_orders`, on the device of ``scores``.

    Returns:
        A new tensor, of the shape and dtype of ``scores``. Computed in float32 (float64 if ``scores`` are).
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        return add_log_prior(tables, scores.float(), history, strength, mixture).to(scores.dtype)
    strength = strength[:, None]
    unigram = tables.unigram_row(scores.shape[1])
    if tables.order == 1:
        return torch.addcmul(scores, strength if mixture is None else strength * mixture[0], unigram)

    contexts = tables.find(history)
    if mixture is None:
        shares = strength.expand(-1, tables.order)
    else:
        shares = _order_shares(contexts, mixture).mul_(strength)
    result = torch.addcmul(scores, shares[:, :1], unigram)
    shares = shares[:, 1:].reshape(-1)
    result += (shares * contexts.backoffs).view(len(scores), -1).sum(1, keepdim=True)
    at, amounts = _continuations(tables, contexts, shares, result.shape)
    result.view(-1).index_add_(0, at, amounts.to(scores.dtype))
    return result


def _order_shares(contexts: Contexts, mixture: Tensor) -> Tensor:
    """What the terms of each order weigh, given which contexts match, float32 [B, n]. Order 1 always matches."""
    matched = (contexts.counts > 0).view(-1, len(mixture) - 1)
    return torch.addmm(mixture[0], matched.to(mixture.dtype), mixture[1:])


def counts_on_host(device: torch.device) -> bool:
    """Whether reading a number back from the device costs nothing."""
    return device.type == "cpu"


def _continuations(tables: Tables, contexts: Contexts, shares: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """The sparse part: int flat positions in a tensor of ``shape``, and the float32 amounts to add there.

    The host knows how many continuations there are only on the CPU. Elsewhere the result has room for as many as the
    batch could have, and the slots that are left over add nothing.
    """
    rows, width = shape
    on_host = counts_on_host(shares.device)
    index = torch.int32 if rows * width + SMALL_BIAS < 2**31 else torch.int64
    stop = contexts.counts.cumsum(0, dtype=index)
    total = int(stop[-1]) if on_host else rows * tables.most_continuations
    if on_host:
        slots = _host_slots(1 << total.bit_length(), index)[:total]
        owner = torch.repeat_interleave(contexts.counts, output_size=total)
    else:
        slots = torch.arange(total, dtype=index, device=shares.device)
        owner = torch.searchsorted(stop, slots, right=True).clamp_(max=stop.numel() - 1)
    position = (contexts.ends - stop).index_select(0, owner).add_(slots)
    amounts = shares.index_select(0, owner)
    if not on_host:
        position = position.masked_fill(slots >= stop[-1], 0)
        amounts = amounts.masked_fill(slots >= stop[-1], 0)
    row_starts = _host_row_starts if on_host else _row_starts
    at = row_starts(rows, width, tables.order - 1, tables.word_bias, index, shares.device).index_select(0, owner)
    at += tables.words.index_select(0, position)
    return at, amounts.mul_(tables.deltas.index_select(0, position))


def _row_starts(rows: int, width: int, contexts: int, bias: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each context of each row, where the row begins in a flat [rows, width], plus the bias of stored words."""
    starts = torch.arange(bias, bias + rows * width, width, dtype=dtype, device=device)
    return starts[:, None].expand(-1, contexts).reshape(-1)


# Constants that the host need not make again at every step.
_host_row_starts = lru_cache(maxsize=64)(_row_starts)


@lru_cache(maxsize=64)
def _host_slots(count: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(count, dtype=dtype)
