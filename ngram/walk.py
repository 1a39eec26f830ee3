"""The look-up for a few rows on the host: in Python and numpy, whose steps cost a tenth of a tensor operation's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Context = tuple[int, int, int]
"""Start and end of its continuations, and the code of its log γ; start = end if the model lacks it."""


Mixture = Sequence[Sequence[float]]


class Sparse(NamedTuple):
    """What contexts add to rows of scores, beside the unigram row."""

    positions: NDArray[np.int64]  # in the flat rows [N]
    amounts: NDArray[np.float32]  # to add there [N]
    shifts: list[float]  # to add to each whole row


@dataclass(frozen=True, eq=False)
class Walk:
    """The parts of `ngram.tables.Tables` that a walk from the root of the trie needs, as plain numbers and buffers.

    Attributes:
        nodes: of every node and one more at the end, the distance of its first continuation from that of its run, and
            the code of its log γ.
        runs: position of the first continuation of every run of ``2 ** run_bits`` nodes.
        words: the continuations' ids less ``word_bias``, ascending within a node.
        ids, deltas: the same as an array, and what each adds.
        backoff_book: log γ by code.
        book_starts: where each prior's codes begin.
        first_nodes: number of the first node of each context length.
        first_ngrams: position in ``words`` of the first 2-, 3- … n-gram.
    """

    nodes: memoryview
    runs: memoryview
    words: memoryview
    ids: NDArray[Any]
    deltas: NDArray[np.float32]
    backoff_book: NDArray[np.float32]
    book_starts: Sequence[int]
    first_nodes: Sequence[int]
    first_ngrams: Sequence[int]
    vocab_size: int
    stride: int
    word_bias: int
    run_bits: int

    def find(self, history: Sequence[Sequence[int]], priors: Iterable[int]) -> list[Context]:
        """The contexts of each row, row by row, shortest first.

        Args:
            history: each row's last 1 … n−1 tokens; −1 where there is none.
            priors: whose contexts, one for each row.
        """
        nodes, runs, words, bits = self.nodes, self.runs, self.words, self.run_bits
        found: list[Context] = []
        for tokens, prior in zip(history, priors, strict=False):
            book, first = self.book_starts[prior], 1 + prior * self.stride
            for length in range(1, len(self.first_nodes) + 1):
                context = tokens[-length:]
                known = len(context) == length and 0 <= context[0] < self.vocab_size
                node = first + context[0] if known else 0  # 0 is the empty node
                begin, end = self._span(node)
                for k in range(1, length if known else 0):
                    wanted = context[k] - self.word_bias
                    at = bisect_left(words, wanted, begin, end)
                    if at == end or words[at] != wanted:
                        node, (begin, end) = 0, self._span(0)
                        break
                    node = self.first_nodes[k] + at - self.first_ngrams[k - 1]
                    after = node + 1
                    begin = runs[node >> bits] + nodes[2 * node]
                    end = runs[after >> bits] + nodes[2 * after]
                found.append((begin, end, nodes[2 * node + 1] + book))
        return found

    def sparse(self, found: Sequence[Context], shares: Sequence[float], width: int, shift: bool) -> Sparse:
        """What contexts add.

        Args:
            found: from `find`, n−1 for each row.
            shares: what the terms of each weigh.
            width: of a row of scores.
            shift: whether to add log γ, too.
        """
        per_row, ids, deltas, book = len(self.first_nodes), self.ids, self.deltas, self.backoff_book
        rows = len(found) // per_row
        shifts = [0.0] * rows
        counts, starts, weights, words, amounts = [], [], [], [], []
        for i, (begin, end, code) in enumerate(found):
            row, share = i // per_row, shares[i]
            if shift:
                shifts[row] += share * book.item(code)
            if end > begin:
                counts.append(end - begin)
                starts.append(row * width + self.word_bias)
                weights.append(share)
                words.append(ids[begin:end])
                amounts.append(deltas[begin:end])
        if not counts:
            return Sparse(np.zeros(0, np.int64), np.zeros(0, np.float32), shifts)
        positions = np.repeat(starts, counts)
        positions += np.concatenate(words)
        added = np.concatenate(amounts)
        added *= np.repeat(np.array(weights, np.float32), counts)
        return Sparse(positions, added, shifts)

    def _span(self, node: int) -> tuple[int, int]:
        nodes, runs, after = self.nodes, self.runs, node + 1
        return runs[node >> self.run_bits] + nodes[2 * node], runs[after >> self.run_bits] + nodes[2 * after]


def shares_of(
    found: Sequence[Context], strengths: Sequence[float], mixtures: Sequence[Mixture] | None, order: int
) -> tuple[list[float], list[float]]:
    """What the unigram row weighs in each row of scores, and what the terms of each of its contexts do.

    Args:
        found: the rows' contexts, n−1 for each.
        strengths: λ of each row.
        mixtures: n × n for each row, or one for all, as for `ngram.tables.add_log_prior`; None for the plain
            interpolated prior.
        order: n.
    """
    if mixtures is None:
        return list(strengths), [strength for strength in strengths for _ in range(order - 1)]
    matched = [end > begin for begin, end, _ in found]
    first, others, known = [], [], {}
    for row, strength in enumerate(strengths):
        which = 0 if len(mixtures) == 1 else row
        key = (which, strength, *matched[row * (order - 1) : (row + 1) * (order - 1)])
        if key not in known:
            rows = compress(mixtures[which], (True, *key[2:]))  # order 1 always matches
            known[key] = [strength * sum(column) for column in zip(*rows, strict=True)]
        shares = known[key]
        first.append(shares[0])
        others += shares[1:]
    return first, others
