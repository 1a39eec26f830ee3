"""The batched look-up: every row's prior over the whole vocabulary, added to a batch of scores in one go.

A row of log p(· | h) is the unigram row, plus one number, plus sparse deltas (see `ngram.smoothing`). So the prior of
a batch costs one dense multiply-add of the scores' shape and one scatter of the continuations seen after each
context. Nothing of the vocabulary's size is computed per order, no Python loop runs over rows, and on an accelerator
nothing waits for the host: shapes depend on the tables and the batch size alone, so a CUDA graph can record it.

Contexts form a trie laid out as in `ngram.counts`. A *node* is a context: nodes of length 1 are the token ids, nodes
of length l are sorted by (node of the first l−1 tokens, last token). Every length ends on one empty node, which
stands for "not a context of this model" and has no continuations. One more comes first of all: token −1, "no token".

Several priors over one vocabulary can share a trie (`ngram.layout.join`), so that a batch may mix them: their nodes of
length 1 stand one prior after the other, each prior's ending on an empty node, and everything longer follows from
those.

In memory the tables are as small as in a file: a context is searched for among its parent's continuations, without
an index of contexts. Written for few and cheap operations: at batch 8 a tensor operation costs about as much to start
as to carry out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ngram.encoding import NEVER, RUN_BITS, SMALL_BIAS
from ngram.kernels import uses_triton
from ngram.search import search
from ngram.walk import Walk, shares_of

NO_KEY = torch.iinfo(torch.int64).max
MAX_ORDER = 6
MOST_NGRAMS = 2**31 - 1
"""Longer than one token, all orders together, that training in memory numbers."""
MOST_ROWS_WALKED = 64
TENSORS = ("unigram", "seen", "nodes", "runs", "backoff_book", "book_starts", "words", "deltas")


class Contexts(NamedTuple):
    """What precedes each row, for the orders 2 … n: row by row, shortest context first."""

    starts: Tensor  # as `Tables.runs` [B · (n−1)], position of the node's first continuation
    ends: Tensor  # the same [B · (n−1)], one past its last; as ``starts`` where the model lacks the context
    codes: Tensor  # int32 [B · (n−1)], position of log γ in the tables' book


class Shape(NamedTuple):
    """What `ngram.layout.join` needs to know of a prior before it sees it."""

    vocab_size: int
    ngrams: tuple[int, ...]  # number of 1-, 2- … n-grams, all ids counted as 1-grams


@dataclass(frozen=True, eq=False)
class Tables:
    """One or more smoothed n-gram models over one vocabulary, of order n at most, as flat tensors.

    Small integers are kept as int16, less 32,768, where they fit, else as int32.

    Attributes:
        unigram: log p_1 of every prior, and that of its least probable token in columns from V on: float32 [S, W ≥ V].
        seen: ids that the corpus or the ARPA file holds, bool [S, V].
        nodes: of every node and one more at the end, the distance of its first continuation from that of its run, and
            the code of its log γ; small integers [C + 1, 2].
        runs: position of the first continuation of every run of 16 nodes, plus the bias of ``nodes``; int32, or int64
            where there are more n-grams than that can count [⌈(C + 1) / 16⌉].
        backoff_book: log γ by code, float32 [K].
        book_starts: where each prior's codes begin in it, plus the bias of ``nodes``; int32 [S].
        words: the continuations' ids, ascending within a node; small integers [N].
        deltas: log p_k(w | h) − log γ(h) − log p_{k−1}(w | h′) of each continuation, float32 [N].
        lengths: number of nodes of each context length 1 … n−1, the last empty one not counted.
    """

    unigram: Tensor
    seen: Tensor
    nodes: Tensor
    runs: Tensor
    backoff_book: Tensor
    book_starts: Tensor
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
        return self.seen.shape[1]

    @cached_property
    def stride(self) -> int:
        """Keys are node · stride + token. One more than V, so that −1 and V, no tokens, are no other node's tokens."""
        return self.vocab_size + 1

    @cached_property
    def word_bias(self) -> int:
        """What to add to a stored word."""
        return SMALL_BIAS if self.words.dtype == torch.int16 else 0

    @cached_property
    def impossible(self) -> Tensor:
        """Ids that some prior never predicts, such as a marker of beginnings: int64 [few]."""
        return (self.unigram[:, : self.vocab_size] == NEVER).any(0).nonzero()[:, 0]

    @cached_property
    def shape(self) -> Shape:
        """For `ngram.layout.join`, if the tables hold one prior."""
        return Shape(self.vocab_size, (self.vocab_size, *np.diff(self.first_ngrams).tolist()))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copies: without the walk's buffers, which are made again."""
        return {name: value for name, value in vars(self).items() if name != "_walk"}

    def starts(self) -> Tensor:
        """Where every node's continuations begin, and the end: as ``runs`` [C + 1]. For the host, as the next two."""
        return self.runs.repeat_interleave(1 << RUN_BITS)[: len(self.nodes)] + self.nodes[:, 0]

    def counts(self) -> Tensor:
        """Number of continuations of every node, as ``runs`` [C]."""
        return self.starts().diff()

    def backoffs(self) -> Tensor:
        """log γ of every node, float32 [C], if the tables hold one prior."""
        return self.backoff_book[self.backoff_codes()]

    def backoff_codes(self) -> Tensor:
        """Where in ``backoff_book`` the log γ of every node is, int32 [C], if the tables hold one prior."""
        return self.nodes[:-1, 1] + self.book_starts

    @cached_property
    def first_nodes(self) -> tuple[int, ...]:
        """Number of the first node of each context length."""
        return tuple(np.cumsum((1, *(count + 1 for count in self.lengths)))[:-1].tolist())

    @cached_property
    def first_ngrams(self) -> tuple[int, ...]:
        """Position in ``words`` of the first 2-, 3- … n-gram, and the end."""
        return (*self.starts()[list(self.first_nodes)].tolist(), len(self.words))

    @cached_property
    def widest(self) -> tuple[int, ...]:
        """The most continuations that a context of each length 1 … n−1 has."""
        counts = self.counts()
        spans = zip(self.first_nodes, self.lengths, strict=True)
        return tuple(int(counts[first : first + length + 1].max()) for first, length in spans)

    def ngram_keys(self, k: int) -> Tensor:
        """The key of every k-gram, nodes counted within their length: ascending int64 [N_k + 1], `NO_KEY` last."""
        first, length = self.first_nodes[k - 2], self.lengths[k - 2]
        begin, end = self.first_ngrams[k - 2], self.first_ngrams[k - 1]
        parents = torch.repeat_interleave(self.counts()[first : first + length], output_size=end - begin)
        keys = parents.to(torch.int64) * self.stride + self.token_ids(self.words[begin:end])
        return torch.cat((keys, keys.new_tensor([NO_KEY])))

    def token_ids(self, words: Tensor) -> Tensor:
        """Stored words as int64 ids."""
        return words.to(torch.int64) + self.word_bias

    def to(self, device: torch.device | str) -> Tables:
        """The same tables on another device."""
        return self._with(**{name: getattr(self, name).to(device) for name in TENSORS})

    def fits(self, width: int) -> bool:
        """Whether scores of ``width`` columns have every id that the n-grams have."""
        return width >= self.vocab_size or not bool(self.seen[:, width:].any())

    def widened(self, width: int) -> Tables:
        """The same tables for scores of ``width`` columns, which they fit.

        Columns from V on belong to no token: they get what the least probable token gets, so that they never gain on
        any. With fewer columns than V, ids without one are left out: a tokenizer may have more than its model scores.
        """
        unigram = self.unigram[:, : min(width, self.vocab_size)]
        if width > self.vocab_size:
            floor = unigram.masked_fill(unigram == NEVER, 0).amin(1, keepdim=True)
            unigram = torch.cat((unigram, floor.expand(-1, width - self.vocab_size)), 1)
        if width == self.unigram.shape[1]:
            return self
        changed = self._with(unigram=unigram.contiguous())
        if width < self.vocab_size:
            vars(changed).update(impossible=changed.impossible[changed.impossible < width])
        return changed

    def with_unigram(self, row: Tensor) -> Tables:
        """The same tables with another row, float32 [V], in place of log p_1, if they hold one prior."""
        changed = self._with(unigram=row[None])
        vars(changed).update(impossible=(row == NEVER).nonzero()[:, 0])
        return changed

    def _with(self, **changes: Any) -> Tables:
        changed = replace(self, **changes)
        # The host needs these: read now, not in a step, where the device would have to be waited for.
        vars(changed).update(first_ngrams=self.first_ngrams, widest=self.widest)
        vars(changed).update(impossible=self.impossible.to(changed.unigram.device))
        return changed

    @cached_property
    def _first_node_row(self) -> Tensor:
        return torch.tensor(self.first_nodes, device=self.nodes.device)

    @cached_property
    def _this_and_next(self) -> Tensor:
        return torch.tensor([[0], [1]], device=self.nodes.device)

    def find(self, history: Tensor, prior: int | Tensor = 0) -> Contexts:
        """Looks up the last 1 … n−1 tokens of each row.

        Args:
            history: token ids, int64 [B, H]; −1 where there is no token. Ids from V on match nothing.
            prior: whose contexts: one for all rows, or int64 [B].
        """
        if is_walked(history):
            priors = prior.tolist() if isinstance(prior, Tensor) else repeat(prior)
            found = self._walk.find(history[:, 1 - self.order :].tolist(), priors)
            return Contexts(*torch.tensor(found, dtype=self.runs.dtype).view(-1, 3).unbind(1))
        longest = self.order - 1
        window = history[:, -longest:].clamp(max=self.vocab_size)
        if window.shape[1] < longest:
            window = torch.nn.functional.pad(window, (longest - window.shape[1], 0), value=-1)
        starting = window  # the nodes that begin at each position, counted within their length, which is 1 at first
        if isinstance(prior, Tensor):
            starting = torch.add(window, prior[:, None], alpha=self.stride)
        elif prior:
            starting = window + prior * self.stride
        last = [starting[:, -1]]
        for length in range(2, self.order):
            starting = self._children(length, starting[:, :-1], window[:, length - 1 :])
            last.append(starting[:, -1])
        nodes = torch.stack(last, 1).add_(self._first_node_row).view(-1)
        starts, ends, codes = self._records(nodes)
        if isinstance(prior, Tensor):
            codes = codes + self.book_starts.index_select(0, prior).repeat_interleave(longest)
        else:
            codes = codes + self.book_starts[prior : prior + 1]  # 1-D, or the sum would stay in int16
        return Contexts(starts, ends, codes)

    @cached_property
    def _walk(self) -> Walk:
        nodes, runs = (each.reshape(-1).numpy() for each in (self.nodes, self.runs))
        return Walk(
            nodes=nodes.data,
            runs=runs.data,
            words=self.words.numpy().data,
            ids=self.words.numpy(),
            deltas=self.deltas.numpy(),
            backoff_book=self.backoff_book.numpy(),
            book_starts=self.book_starts.tolist(),
            first_nodes=self.first_nodes,
            first_ngrams=self.first_ngrams,
            vocab_size=self.vocab_size,
            stride=self.stride,
            word_bias=self.word_bias,
            run_bits=RUN_BITS,
        )

    def _records(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of each node, numbered over all lengths: where its continuations begin and end, and its back-off's code."""
        both = (nodes + self._this_and_next).view(-1)
        records = self.nodes.index_select(0, both)
        bounds = self.runs.index_select(0, both >> RUN_BITS) + records[:, 0]
        starts, ends = bounds.view(2, -1).unbind()
        return starts, ends, records[: len(nodes), 1]

    def _children(self, length: int, parents: Tensor, tokens: Tensor) -> Tensor:
        """The nodes of ``length`` that continue ``parents`` with ``tokens``, all counted within their length."""
        starts, ends, _ = self._records((parents + self.first_nodes[length - 2]).reshape(-1))
        position, found = search(self.words, starts, ends, tokens.reshape(-1) - self.word_bias, self.widest[length - 2])
        within = position - self.first_ngrams[length - 2]
        return within.where(found, self.lengths[length - 1]).view(parents.shape)

    def score(self, history: Tensor, tokens: Tensor) -> Tensor:
        """log p of one token per row, without building rows over the vocabulary, if the tables hold one prior.

        Args:
            history: int64 [B, H], as in `find`.
            tokens: int64 [B], in [0, V).

        Returns:
            float32 [B].
        """
        total = self.unigram[0, tokens]
        if self.order == 1 or not len(tokens):
            return total
        contexts = Contexts(*(each.view(len(tokens), -1) for each in self.find(history)))
        total = total + self.backoff_book[contexts.codes].sum(1)
        for column, widest in enumerate(self.widest):
            if widest:
                spans = contexts.starts[:, column], contexts.ends[:, column]
                at, found = search(self.words, *spans, tokens - self.word_bias, widest)
                total = total + self.deltas[at].where(found, 0)
        return total


def mixture_of_orders(weights: Sequence[float]) -> Tensor:
    """The ``mixture`` of `add_log_prior` for one prior Σ_k w_k log p_k: float32 [1, n, n], row k for order k.

    log p_k contains the terms (log γ and delta) of all orders up to k, so order k gives w_k to each of those.
    """
    return torch.tensor(weights, dtype=torch.float32)[:, None].expand(-1, len(weights)).tril()[None]


def add_log_prior(
    tables: Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None = None,
    *,
    prior: int | Tensor = 0,
    shift: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """scores + strength · log prior, for every row of a batch.

    The prior of a row is log p_n(· | h), or, with ``mixture``, Σ_k w_k log p_k(· | h) over the orders k whose context
    is in the model. Entries at −inf stay there. What a prior never predicts becomes as good as impossible where λ is
    positive, and stays as it is where λ is negative.

    Args:
        tables: one prior, or several (see `ngram.layout.join`), on the device of ``scores``.
        scores: float [B, W], W the width of ``tables.unigram`` (see `Tables.widened`).
        history: token ids, int64 [B, H]; −1 where there is no token.
        strength: λ of each row, float32 [B]. Rows with 0 come back as they are.
        mixture: of every prior, float32 [S, n, n], from `mixture_of_orders`, on the device of ``scores``.
        prior: which of the priors: one for all rows, or int64 [B].
        shift: False leaves out what is the same for a whole row (the back-offs), where only differences count.
        out: where to put the result: float32, and may be ``scores`` itself. By default a new tensor.

    Returns:
        ``out``, of the shape and dtype of ``scores``. Computed in float32 (float64 if ``scores`` are).
    """
    if uses_triton(scores.device):
        from ngram import prior_kernel

        return prior_kernel.add_log_prior(tables, scores, history, strength, mixture, prior=prior, shift=shift, out=out)
    if scores.dtype in (torch.float16, torch.bfloat16):
        wide = scores.float()
        return add_log_prior(tables, wide, history, strength, mixture, prior=prior, shift=shift).to(scores.dtype)
    if len(ids := tables.impossible):
        before = scores.index_select(1, ids)
        result = _added(tables, scores, history, strength[:, None], mixture, prior, shift, out)
        stays = (_of_prior(tables.unigram[:, ids], prior) == NEVER) & (strength[:, None] < 0)
        result[:, ids] = torch.where(stays, before, result[:, ids])
        return result
    return _added(tables, scores, history, strength[:, None], mixture, prior, shift, out)


def _added(
    tables: Tables,
    scores: Tensor,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None,
    prior: int | Tensor,
    shift: bool,
    out: Tensor | None,
) -> Tensor:
    """`add_log_prior` in the dtype of ``scores``, strength [B, 1]."""
    if mixture is not None:
        mixture = _of_prior(mixture, prior)
    if tables.order == 1:
        share = strength if mixture is None else strength * mixture[..., 0]
        return _add_unigram(tables, scores, share, prior, out)

    walked = is_walked(history)
    terms = (_terms_on_host if walked else _terms)(tables, history, strength, mixture, prior, scores.shape, shift)
    result = _add_unigram(tables, scores, terms.share, prior, out)
    if shift:
        result += terms.shift
    result.view(-1).index_add_(0, terms.at, terms.amounts.to(result.dtype))
    return result


class _AddedTerms(NamedTuple):
    """What is added to a batch of scores."""

    share: Tensor  # of the unigram row, float [B, 1]
    shift: Tensor  # the back-offs, float [B, 1]
    at: Tensor  # of the continuations, int flat positions [N]
    amounts: Tensor  # float32 [N]


def _terms(
    tables: Tables,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None,
    prior: int | Tensor,
    shape: torch.Size,
    shift: bool,
) -> _AddedTerms:
    contexts = tables.find(history, prior)
    if mixture is None:
        shares = strength.expand(-1, tables.order)
    else:
        shares = _order_shares(contexts, mixture).mul_(strength)
    first, others = shares[:, :1], shares[:, 1:].reshape(-1)
    backoffs = tables.backoff_book.index_select(0, contexts.codes) if shift else torch.zeros_like(others)
    at, amounts = _continuations(tables, contexts, others, shape)
    return _AddedTerms(first, (others * backoffs).view(len(first), -1).sum(1, keepdim=True), at, amounts)


def _terms_on_host(
    tables: Tables,
    history: Tensor,
    strength: Tensor,
    mixture: Tensor | None,
    prior: int | Tensor,
    shape: torch.Size,
    shift: bool,
) -> _AddedTerms:
    """The same for a few rows on the host, with few tensor operations: they would cost more than what they do."""
    walk, order = tables._walk, tables.order
    priors = prior.tolist() if isinstance(prior, Tensor) else repeat(prior)
    found = walk.find(history[:, 1 - order :].tolist(), priors)
    mixtures = None if mixture is None else mixture.view(-1, order, order).tolist()
    first, others = shares_of(found, strength[:, 0].tolist(), mixtures, order)
    positions, amounts, shifts = walk.sparse(found, others, shape[1], shift)
    columns = torch.tensor(first).unsqueeze_(1), torch.tensor(shifts).unsqueeze_(1)
    return _AddedTerms(*columns, torch.from_numpy(positions), torch.from_numpy(amounts))


def is_walked(history: Tensor) -> bool:
    """Whether rows are few, and on the host."""
    return len(history) <= MOST_ROWS_WALKED and counts_on_host(history.device)


def _of_prior(values: Tensor, prior: int | Tensor) -> Tensor:
    """The values of one prior [...], or of each row's [B, ...]."""
    return values.index_select(0, prior) if isinstance(prior, Tensor) else values[prior]


def _add_unigram(tables: Tables, scores: Tensor, share: Tensor, prior: int | Tensor, out: Tensor | None) -> Tensor:
    """scores + share · log p_1, share float [B, 1]."""
    if isinstance(prior, int):
        return torch.addcmul(scores, share, tables.unigram[prior], out=out)
    if not counts_on_host(scores.device):
        return torch.addcmul(scores, share, tables.unigram.index_select(0, prior), out=out)
    # On a CPU what costs is memory's traffic: gathering the rows first would double it.
    result = scores.clone() if out is None else out if out is scores else out.copy_(scores)
    for row, (index, weight) in enumerate(zip(prior.tolist(), share[:, 0].tolist(), strict=True)):
        if weight:
            result[row].add_(tables.unigram[index], alpha=weight)
    return result


def _order_shares(contexts: Contexts, mixture: Tensor) -> Tensor:
    """What the terms of each order weigh, given which contexts match, float32 [B, n]. Order 1 always matches."""
    matched = (contexts.ends > contexts.starts).view(-1, mixture.shape[-1] - 1, 1)
    return (matched * mixture[..., 1:, :]).sum(1).add_(mixture[..., 0, :])


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
    counts = contexts.ends - contexts.starts
    stop = counts.cumsum(0, dtype=index)
    total = int(stop[-1]) if on_host else rows * sum(tables.widest)
    if on_host:
        slots = torch.arange(total, dtype=index)
        owner = torch.repeat_interleave(counts, output_size=total)
    else:
        slots = torch.arange(total, dtype=index, device=shares.device)
        owner = torch.searchsorted(stop, slots, right=True).clamp_(max=stop.numel() - 1)
    position = (contexts.ends - stop).index_select(0, owner).add_(slots)
    amounts = shares.index_select(0, owner)
    if not on_host:
        position = position.masked_fill(slots >= stop[-1], 0)
        amounts = amounts.masked_fill(slots >= stop[-1], 0)
    at = _row_starts(rows, width, tables.order - 1, tables.word_bias, index, shares.device).index_select(0, owner)
    at += tables.words.index_select(0, position)
    return at, amounts.mul_(tables.deltas.index_select(0, position))


def _row_starts(rows: int, width: int, contexts: int, bias: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """For each context of each row, where the row begins in a flat [rows, width], plus the bias of stored words."""
    starts = torch.arange(bias, bias + rows * width, width, dtype=dtype, device=device)
    return starts[:, None].expand(-1, contexts).reshape(-1)
