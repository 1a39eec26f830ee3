"""Makes `ngram.tables.Tables`: of a smoothed model, or of several priors that are to share a trie."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ngram.encoding import NEVER, RUN_BITS, SMALL_BIAS, SMALL_VOCAB
from ngram.errors import NGramError
from ngram.smoothing import Estimates
from ngram.tables import MOST_NGRAMS, Shape, Tables

_AT_A_TIME = 1 << 17


class SortedNGrams(NamedTuple):
    """The k-grams of one order k ≥ 2, sorted by (index of the first k−1 tokens in their order, last token)."""

    parents: NDArray[np.integer]  # that index [N]
    words: NDArray[np.integer]  # that token [N]


def tables_from_estimates(seen: NDArray[np.bool_], ngrams: Sequence[SortedNGrams], estimates: Estimates) -> Tables:
    """Lays a smoothed model out as `Tables`, on the CPU.

    Args:
        seen: ids that occur, bool [V].
        ngrams: of the orders 2 … n.
        estimates: of the same.

    Raises:
        NGramError: more n-grams than `MOST_NGRAMS`.
    """
    vocab_size = len(seen)
    if (total := sum(len(each.words) for each in ngrams)) > MOST_NGRAMS:
        raise too_many(total)
    lengths = (vocab_size, *(len(each.words) for each in ngrams))[: len(ngrams)]
    backoff: list = [[0.0]]
    counts: list = [[0]]
    for length, gamma, longer in zip(lengths, estimates.backoffs, ngrams, strict=True):
        backoff += [gamma, [0.0]]
        counts.append(np.bincount(longer.parents, minlength=length + 1).astype(np.int32))
    book, codes = _coded(_joined(backoff, np.float32))
    nodes = pack_nodes(torch.from_numpy(_joined(counts, np.int32)), torch.from_numpy(codes), [torch.from_numpy(book)])
    words = _joined([each.words for each in ngrams], np.int32)
    if vocab_size <= SMALL_VOCAB:
        words -= SMALL_BIAS
        words = words.astype(np.int16)
    return Tables(
        unigram=torch.from_numpy(np.maximum(estimates.unigram, NEVER).astype(np.float32))[None],
        seen=torch.from_numpy(seen)[None],
        **nodes,
        words=torch.from_numpy(words),
        deltas=torch.from_numpy(_joined(estimates.deltas, np.float32)),
        lengths=lengths,
    )


def too_many(ngrams: int) -> NGramError:
    """What is raised for more n-grams than `MOST_NGRAMS`."""
    return NGramError(
        f"{ngrams:,} n-grams are more than the {MOST_NGRAMS:,} that training in memory holds: lower the order, or "
        "train on disk (ngram.distributed)"
    )


def unigram_tables(row: Tensor, seen: Tensor) -> Tables:
    """Tables of order 1, which add the same row whatever the context.

    Args:
        row: log p_1, or anything else to be added, float32 [V].
        seen: ids that occur, bool [V].
    """
    nothing = torch.zeros(1, dtype=torch.int64)
    small = len(row) <= SMALL_VOCAB
    return Tables(
        unigram=row[None],
        seen=seen[None],
        **pack_nodes(nothing, nothing, [torch.zeros(1)]),
        words=torch.zeros(0, dtype=torch.int16 if small else torch.int32),
        deltas=torch.zeros(0),
        lengths=(),
    )


def _joined(parts: list, dtype: type) -> np.ndarray:
    return np.concatenate(parts, dtype=dtype, casting="unsafe") if parts else np.zeros(0, dtype)


def _coded(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, ascending, and where each value stands among them, int32; without an index of all."""
    book = np.unique(values)
    codes = np.empty(len(values), np.int32)
    for begin in range(0, len(values), _AT_A_TIME):
        some = slice(begin, begin + _AT_A_TIME)
        codes[some] = np.searchsorted(book, values[some])
    return book, codes


class NodeFields(TypedDict):
    """The fields of `Tables` that describe nodes."""

    nodes: Tensor
    runs: Tensor
    backoff_book: Tensor
    book_starts: Tensor


def pack_nodes(counts: Tensor, codes: Tensor, books: Sequence[Tensor]) -> NodeFields:
    """Lays nodes out.

    Args:
        counts: number of continuations of every node, int [C].
        codes: of the log γ of every node in its prior's book, int [C].
        books: float32 [K] of every prior.
    """
    run = 1 << RUN_BITS
    kind = torch.int32 if fits_int32(int(counts.sum())) else torch.int64
    distances = torch.zeros(len(counts) + 1, dtype=kind)
    torch.cumsum(counts, 0, dtype=kind, out=distances[1:])
    runs = distances[::run].clone()
    whole = len(distances) // run * run  # in place: there may be a hundred million of them
    distances[:whole].view(-1, run).sub_(runs[: whole // run, None])
    distances[whole:].sub_(runs[whole // run :])
    small = are_small(int(distances.max()), int(codes.max()))
    bias = SMALL_BIAS if small else 0
    nodes = torch.zeros(len(distances), 2, dtype=torch.int16 if small else torch.int32)
    nodes[:, 0] = distances.sub_(bias)
    nodes[:-1, 1] = codes - bias
    return {
        "nodes": nodes,
        "runs": runs + bias,
        "backoff_book": torch.cat(list(books)),
        "book_starts": torch.tensor([0, *map(len, books)], dtype=torch.int32).cumsum(0, dtype=torch.int32)[:-1] + bias,
    }


def fits_int32(ngrams: int) -> bool:
    """Whether ``runs`` of so many n-grams, with a bias, are int32."""
    return ngrams + SMALL_BIAS < 1 << 31


def are_small(distance: int, code: int) -> bool:
    """Whether ``nodes`` with no higher numbers than these are int16."""
    return max(distance, code) < 2 * SMALL_BIAS


def join(shapes: Sequence[Shape], priors: Iterable[Tables], width: int | None = None) -> Tables:
    """Several priors in one trie, so that one call of `add_log_prior` can give every row another one.

    Takes as much memory as they do; each can be let go of before the next one is made. One by itself stays as it is.

    Args:
        shapes: `Tables.shape` of each.
        priors: each holds one, all over the same vocabulary, on the CPU. Orders may differ.
        width: columns of the scores they will be added to; V by default.

    Raises:
        NGramError: no prior, or vocabularies of different sizes.
    """
    sizes = {shape.vocab_size for shape in shapes}
    if len(sizes) != 1:
        raise NGramError(f"priors can be joined over one vocabulary, not over {len(sizes)}: {sorted(sizes)} token ids")
    (vocab_size,) = sizes
    if len(shapes) == 1:  # as it is: one that is mapped stays so
        (prior,) = priors
        return prior.widened(width or vocab_size)
    order = max(len(shape.ngrams) for shape in shapes)
    per_order = [[shape.ngrams[k] if k < len(shape.ngrams) else 0 for shape in shapes] for k in range(order)]
    # Nodes of length 1: each prior's tokens and one empty node. Longer ones: all priors' and one empty node.
    blocks = [[count + (length == 1) for count in per_order[length - 1]] for length in range(1, order)]
    lengths = tuple(sum(block) - (i == 0) for i, block in enumerate(blocks))
    ends = np.cumsum([0, *(count for row in per_order[1:] for count in row)])
    ngram_starts = ends[:-1].reshape(order - 1, len(shapes))
    node_starts = [
        first + np.cumsum([0, *block[:-1]])
        for first, block in zip(np.cumsum([1, *(length + 1 for length in lengths)]), blocks, strict=False)
    ]
    counts, codes = (torch.zeros(sum(lengths) + len(lengths) + 1, dtype=torch.int32) for _ in range(2))
    unigram = torch.empty(len(shapes), width or vocab_size)
    seen = torch.empty(len(shapes), vocab_size, dtype=torch.bool)
    small = vocab_size <= SMALL_VOCAB
    words = torch.empty(int(ends[-1]), dtype=torch.int16 if small else torch.int32)
    deltas = torch.empty(int(ends[-1]))
    books = []
    for i, prior in enumerate(priors):
        unigram[i], seen[i] = prior.widened(unigram.shape[1]).unigram[0], prior.seen[0]
        books.append(torch.cat((torch.zeros(1), prior.backoff_book)))  # empty nodes, nobody's, have code 0 in any book
        own_counts, own_codes = prior.counts(), prior.backoff_codes() + 1
        for k in range(2, prior.order + 1):
            nodes = slice(prior.first_nodes[k - 2], prior.first_nodes[k - 2] + prior.lengths[k - 2])
            at = int(node_starts[k - 2][i])
            counts[at : at + prior.lengths[k - 2]] = own_counts[nodes]
            codes[at : at + prior.lengths[k - 2]] = own_codes[nodes]
            ngrams = slice(*prior.first_ngrams[k - 2 : k])
            at = int(ngram_starts[k - 2, i])
            words[at : at + ngrams.stop - ngrams.start] = prior.words[ngrams]
            deltas[at : at + ngrams.stop - ngrams.start] = prior.deltas[ngrams]
        del prior
    return Tables(
        unigram=unigram, seen=seen, **pack_nodes(counts, codes, books), words=words, deltas=deltas, lengths=lengths
    )
