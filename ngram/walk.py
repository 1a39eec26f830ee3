"""The look-up for a few rows on the host: in plain Python, whose step costs a tenth of a tensor operation's."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, eq=False)
class Walk:
    """The parts of `ngram.tables.Tables` that a walk from the root of the trie needs, as plain numbers and buffers.

    Attributes:
        nodes: of every node and one more at the end, the distance of its first continuation from that of its run, and
            the code of its log γ.
        runs: position of the first continuation of every run of ``2 ** run_bits`` nodes.
        words: the continuations' ids less ``word_bias``, ascending within a node.
        book_starts: where each prior's codes begin.
        first_nodes: number of the first node of each context length.
        first_ngrams: position in ``words`` of the first 2-, 3- … n-gram.
    """

    nodes: memoryview
    runs: memoryview
    words: memoryview
    book_starts: Sequence[int]
    first_nodes: Sequence[int]
    first_ngrams: Sequence[int]
    vocab_size: int
    stride: int
    word_bias: int
    run_bits: int

    def find(self, history: Sequence[Sequence[int]], priors: Iterable[int]) -> list[tuple[int, int, int]]:
        """The contexts of each row, shortest first: start and end of their continuations, and the code of log γ.

        Args:
            history: each row's last 1 … n−1 tokens; −1 where there is none.
            priors: whose contexts, one for each row.
        """
        found: list[tuple[int, int, int]] = []
        for tokens, prior in zip(history, priors, strict=False):
            for length in range(1, len(self.first_nodes) + 1):
                node = self._node(tokens[-length:], length, prior)
                found.append((*self._span(node), self.nodes[2 * node + 1] + self.book_starts[prior]))
        return found

    def _node(self, context: Sequence[int], length: int, prior: int) -> int:
        """The number of a context, or 0, the empty node, if the prior lacks it."""
        if len(context) < length or not 0 <= context[0] < self.vocab_size:
            return 0
        node = 1 + prior * self.stride + context[0]
        for k, token in enumerate(context[1:], start=1):
            begin, end = self._span(node)
            at = bisect_left(self.words, token - self.word_bias, begin, end)
            if at == end or self.words[at] != token - self.word_bias:
                return 0
            node = self.first_nodes[k] + at - self.first_ngrams[k - 1]
        return node

    def _span(self, node: int) -> tuple[int, int]:
        nodes, runs, after = self.nodes, self.runs, node + 1
        return runs[node >> self.run_bits] + nodes[2 * node], runs[after >> self.run_bits] + nodes[2 * after]
