"""A row's contexts, and their continuations within some columns, for kernels of Triton: parts that run in one program.

All lengths of context are looked up side by side, as rows of a block. A search looks at `PROBES` places at once: two
rounds, where halving would wait for memory seventeen times.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from ngram import encoding

PROBES = tl.constexpr(256)
CHUNK = tl.constexpr(128)
MORE = tl.constexpr(1024)
"""Continuations of a context that are loaded early, and at a time after these."""
NEVER = tl.constexpr(encoding.NEVER)
_RUN_BITS = tl.constexpr(encoding.RUN_BITS)
_SMALL_BIAS = tl.constexpr(encoding.SMALL_BIAS)
_EQUAL = tl.constexpr(1 << 16)


def places_of(order: int) -> int:
    """Room for the contexts of a row, PLACES below: a power of 2, as Triton wants it."""
    return 1 << max(order - 2, 0).bit_length()


def rounds_of(widest: Sequence[int]) -> int:
    """How many rounds of `search` find any word, ROUNDS below, where no context has more than ``widest`` of them."""
    rounds = 1
    while PROBES.value**rounds < max(widest, default=0):
        rounds += 1
    return rounds


@triton.jit
def search(words, starts, ends, wanted, ROUNDS: tl.constexpr):
    """Where the first word from ``wanted`` on stands in words[starts : ends], and whether it is that word.

    Args:
        words: small integers, ascending from each start to its end.
        starts, ends: int64 [N].
        wanted: int32 [N].

    Returns:
        int64 [N], in starts … ends, and int1 [N].
    """
    if words.dtype.element_ty == tl.int16:
        wanted -= _SMALL_BIAS
    found = starts < starts
    for _ in tl.static_range(ROUNDS):
        step = (ends - starts + PROBES - 1) // PROBES
        at = starts[:, None] + step[:, None] * tl.arange(0, PROBES)[None, :]
        within = at < ends[:, None]
        probed = tl.load(words + at, mask=within, other=0).to(tl.int32)
        # Both answers in one sum: how many are less, and whether one is equal.
        hits = tl.where(probed < wanted[:, None], 1, tl.where(probed == wanted[:, None], _EQUAL, 0))
        hits = tl.sum(tl.where(within, hits, 0), 1)
        below = (hits % _EQUAL).to(tl.int64)
        found |= hits >= _EQUAL
        ends = tl.minimum(starts + below * step, ends)
        starts = tl.where(below > 0, starts + (below - 1) * step + 1, starts)
    return starts, found


@triton.jit
def _spans(nodes, runs, node):
    """Where the continuations of nodes begin and end, int64."""
    after = node + 1
    starts = tl.load(runs + (node >> _RUN_BITS)).to(tl.int64) + tl.load(nodes + 2 * node)
    ends = tl.load(runs + (after >> _RUN_BITS)).to(tl.int64) + tl.load(nodes + 2 * after)
    return starts, ends


@triton.jit
def _token_at(history, history_step, at, mask, vocab_size):
    """Tokens of a row, int32; −1 for what is none, as places before the first."""
    token = tl.load(history + at * history_step, mask=mask & (at >= 0), other=-1)
    return tl.where((token >= 0) & (token < vocab_size), token, -1).to(tl.int32)


@triton.jit
def find_contexts(
    history,
    history_step,
    tokens,
    prior,
    nodes,
    runs,
    words,
    book_starts,
    vocab_size,
    joined,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """The contexts of one row: in place l the one of l + 1 tokens.

    What the model lacks is node 0, which has no continuations and log γ = 0; so are the places from ORDER − 1 on.

    Args:
        history: the row's tokens, int64, ``history_step`` apart.
        tokens: how many, H.
        prior: whose contexts, a number.
        nodes, runs, words, book_starts, vocab_size: of `ngram.tables.Tables`.
        joined: how many priors the tables hold.

    Returns:
        starts, ends: of the continuations in ``words``, int64 [PLACES].
        codes: where log γ stands in the tables' ``backoff_book``, int32 [PLACES].
    """
    place = tl.arange(0, PLACES)
    is_context = place < ORDER - 1
    at = tokens - 1 - place
    token = _token_at(history, history_step, at, is_context, vocab_size)
    prior = prior.to(tl.int64)
    first_pair = 1 + joined.to(tl.int64) * (vocab_size + 1)  # number of the first node of two tokens
    node = tl.where(token >= 0, 1 + prior * (vocab_size + 1) + token, 0)
    starts, ends = _spans(nodes, runs, node)
    for length in tl.static_range(2, ORDER):
        is_longer = is_context & (place >= length - 1)
        token = _token_at(history, history_step, at + length - 1, is_longer, vocab_size)
        position, found = search(words, starts, tl.where(is_longer, ends, starts), token, ROUNDS)
        # Nodes of two tokens and more stand in the order of the n-grams they are, and each length ends on an empty one.
        child = tl.where(found, position + first_pair + (length - 2), 0)
        node = tl.where(is_longer, child, node)
        starts, ends = _spans(nodes, runs, node)
    return starts, ends, tl.load(nodes + 2 * node + 1).to(tl.int32) + tl.load(book_starts + prior)


@triton.jit
def shares_of(starts, ends, strength, mixture, prior, ORDER: tl.constexpr, PLACES: tl.constexpr):
    """What the unigram row weighs in one row, float32, and what the terms of each of its contexts do, [PLACES].

    Args:
        starts, ends: from `find_contexts`.
        strength: λ of the row, float32.
        mixture: float32 [S, n, n], or None for the plain interpolated prior.
        prior: the row's, a number.
    """
    first = strength
    others = tl.where(tl.arange(0, PLACES) < ORDER - 1, strength, 0.0)
    if mixture is not None:
        row = tl.arange(0, PLACES)[:, None]
        column = tl.arange(0, PLACES)[None, :]
        weights = mixture + prior.to(tl.int64) * ORDER * ORDER
        is_order = tl.arange(0, PLACES) < ORDER - 1
        is_matched = is_order & (ends > starts)
        of_unigram = tl.load(weights + (tl.arange(0, PLACES) + 1) * ORDER, mask=is_matched, other=0.0)
        of_first = tl.load(weights + 1 + tl.arange(0, PLACES), mask=is_order, other=0.0)
        inner = is_matched[:, None] & (column < ORDER - 1)
        of_others = tl.load(weights + (row + 1) * ORDER + column + 1, mask=inner, other=0.0)
        first = (tl.sum(of_unigram, 0) + tl.load(weights)) * strength  # order 1 always matches
        others = (tl.sum(of_others, 0) + of_first) * strength
    return first, others


@triton.jit
def continuations_of(
    starts,
    ends,
    others,
    begin,
    end,
    words,
    deltas,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
    ROUNDS: tl.constexpr,
):
    """Which continuations have the columns from ``begin`` to ``end``, and the first `CHUNK` of each context.

    Args:
        starts, ends, others: from `find_contexts` and `shares_of`.
        begin, end: int32.
        words, deltas: of `ngram.tables.Tables`.

    Returns:
        firsts, lasts: their positions, int64 [PLACES].
        ids, amounts: int32 and float32 [PLACES, CHUNK].
        some: which of these there are, int1 [PLACES, CHUNK].
    """
    side = tl.arange(0, 2 * PLACES) % 2
    both_starts = tl.reshape(tl.join(starts, starts), [2 * PLACES])
    both_ends = tl.reshape(tl.join(ends, ends), [2 * PLACES])
    position, _ = search(words, both_starts, both_ends, tl.where(side == 0, begin, end), ROUNDS)
    firsts, lasts = tl.split(tl.reshape(position, [PLACES, 2]))
    at = firsts[:, None] + tl.arange(0, CHUNK)[None, :]
    ids, amounts, some = _loaded(at, lasts[:, None], others[:, None], words, deltas)
    return firsts, lasts, ids, amounts, some


@triton.jit
def _loaded(at, end, share, words, deltas):
    """The continuations at some positions: ids, what they add, and which there are."""
    some = at < end
    ids = tl.load(words + at, mask=some, other=0).to(tl.int32)
    if words.dtype.element_ty == tl.int16:
        ids += _SMALL_BIAS
    return ids, tl.load(deltas + at, mask=some, other=0.0) * share, some


@triton.jit
def add_continuations(
    out,
    firsts,
    lasts,
    ids,
    amounts,
    some,
    others,
    words,
    deltas,
    unigram,
    keeps,
    ORDER: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Adds a row's continuations, context by context, to what the program has written of ``out`` before.

    A context has each id once. Between contexts the program's threads wait for each other: an id may follow several.

    Args:
        out: the row, columns side by side.
        firsts, lasts, ids, amounts, some: from `continuations_of`, whose arguments the others are.
        unigram: the row of the row's prior.
        keeps: whether λ is negative, int1 [1]: ids that the prior never predicts are left alone then.
    """
    for context in tl.static_range(ORDER - 1):
        is_this = tl.arange(0, PLACES) == context
        tl.debug_barrier()
        _add_at(out, ids, amounts, some & is_this[:, None], unigram, keeps)
        last = tl.sum(tl.where(is_this, lasts, 0), 0)
        share = tl.sum(tl.where(is_this, others, 0.0), 0)
        begin = tl.sum(tl.where(is_this, firsts, 0), 0) + CHUNK
        for at in range(begin, last, MORE):
            ids_here, amounts_here, some_here = _loaded(at + tl.arange(0, MORE), last, share, words, deltas)
            _add_at(out, ids_here, amounts_here, some_here, unigram, keeps)


@triton.jit
def _add_at(out, ids, amounts, some, unigram, keeps):
    some &= tl.load(unigram + ids, mask=some & keeps, other=0.0) != NEVER
    before = tl.load(out + ids, mask=some, other=0.0)
    tl.store(out + ids, before + amounts.to(before.dtype), mask=some)
