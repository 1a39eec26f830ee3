import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllm.contiguous.table import ChunkTable


def brute_force(flags, first, max_chunk, sinks=0):
    """Per row the chunks (start, length) that have ended, a token at a time."""
    rows = []
    for marks, begin in zip(flags, first, strict=True):
        chunks, start = [], begin
        for place in range(begin, len(marks)):
            if marks[place] or place - start + 1 == max_chunk or place - begin + 1 == sinks:
                chunks.append((start, place - start + 1))
                start = place + 1
        rows.append(chunks)
    return rows


def held(table, since=None):
    starts, lengths = table.spans(since)
    rows = []
    for begin, size in zip(starts.tolist(), lengths.tolist(), strict=True):
        known = [pair for pair in zip(begin, size, strict=True) if pair[1]]
        assert all(pair == (0, 0) for pair in list(zip(begin, size, strict=True))[len(known) :])
        rows.append(known)
    return rows


@st.composite
def texts(draw):
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    flags = draw(st.lists(st.lists(st.booleans(), min_size=length, max_size=length), min_size=batch, max_size=batch))
    first = draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch))
    pieces = draw(st.lists(st.integers(1, 9), min_size=1, max_size=length))
    return np.array(flags), np.array(first), draw(st.tuples(st.integers(1, 12), st.integers(0, 5))), pieces


def in_pieces(flags, first, limits, pieces):
    """A table that got the flags in pieces of these sizes, and the rest token by token."""
    table, at, ended = ChunkTable(first, *limits), 0, None
    for size in [*pieces, *[1] * flags.shape[1]]:
        if at < flags.shape[1]:
            ended = table.extend(flags[:, at : at + size])
            at = min(at + size, flags.shape[1])
    return table, ended


@settings(max_examples=150, deadline=None)
@given(texts())
def test_chunks_are_those_of_brute_force_however_the_tokens_come(text):
    flags, first, limits, pieces = text
    wanted = brute_force(flags, first, *limits)
    for sizes in ([flags.shape[1]], [], pieces):
        table, ended = in_pieces(flags, first, limits, sizes)
        assert held(table) == wanted
        assert table.length == flags.shape[1]
        assert table.counts.tolist() == [len(row) for row in wanted]
        running = [flags.shape[1] - (sum(row[-1]) if row else begin) for row, begin in zip(wanted, first, strict=True)]
        assert table.running.tolist() == running
        assert ended.tolist() == [tokens == 0 for tokens in running]
        assert (table.running < limits[0]).all()


@settings(max_examples=100, deadline=None)
@given(texts(), st.data())
def test_truncating_forgets_and_goes_on(text, data):
    flags, first, limits, pieces = text
    table, _ = in_pieces(flags, first, limits, pieces)
    length = data.draw(st.integers(0, flags.shape[1]))
    table.truncate(length)
    assert table.length == length
    assert held(table) == brute_force(flags[:, :length], first, *limits)
    other = np.roll(flags, 1, 1)[:, length:]
    if other.shape[1]:
        table.extend(other)
    assert held(table) == brute_force(np.concatenate((flags[:, :length], other), 1), first, *limits)


@settings(max_examples=100, deadline=None)
@given(texts(), st.data())
def test_rows_are_reordered_repeated_and_dropped(text, data):
    flags, first, limits, pieces = text
    table, _ = in_pieces(flags[:, : flags.shape[1] // 2], first, limits, pieces)
    rows = np.array(data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=5)))
    table.take_rows(rows)
    assert held(table) == brute_force(flags[rows, : flags.shape[1] // 2], first[rows], *limits)
    table.extend(flags[rows, flags.shape[1] // 2 :])
    assert held(table) == brute_force(flags[rows], first[rows], *limits)


@settings(max_examples=100, deadline=None)
@given(texts(), st.data())
def test_spans_since_a_number_of_each_row(text, data):
    flags, first, limits, pieces = text
    table, _ = in_pieces(flags, first, limits, pieces)
    since = np.array([data.draw(st.integers(0, int(count))) for count in table.counts])
    wanted = [row[at:] for row, at in zip(brute_force(flags, first, *limits), since, strict=True)]
    assert held(table, since) == wanted


@settings(max_examples=50, deadline=None)
@given(texts(), st.integers(1, 8))
def test_the_tokens_of_the_longest_chunks(text, count):
    flags, first, limits, pieces = text
    table, _ = in_pieces(flags, first, limits, pieces)
    rows = brute_force(flags, first, *limits)
    wanted = [sum(sorted((size for _, size in row), reverse=True)[:count]) for row in rows]
    assert table.longest(count).tolist() == wanted


@pytest.mark.parametrize("count", [63, 64, 65, 200])
def test_there_is_room_for_any_number_of_chunks(count):
    table = ChunkTable(np.zeros(2, np.int64), 8)
    flags = np.array([[True] * count, [False] * count])
    table.extend(flags)
    assert held(table) == brute_force(flags, [0, 0], 8)


def test_boundaries_among_padding_are_none():
    table = ChunkTable(np.array([3, 0]), 8)
    table.extend(np.ones((2, 5), bool))
    assert held(table) == [[(3, 1), (4, 1)], [(i, 1) for i in range(5)]]


def test_the_first_tokens_are_a_chunk_of_their_own():
    table = ChunkTable(np.array([0, 3, 30]), 8, 4)
    table.extend(np.zeros((3, 16), bool))
    assert held(table) == [[(0, 4), (4, 8)], [(3, 4), (7, 8)], []]


def test_a_row_that_begins_later_than_was_known():
    table = ChunkTable(np.array([5, 0]), 8, 2)
    table.extend(np.ones((2, 5), bool))
    table.first[0] = 7  # the padding of a prompt that comes in pieces
    table.extend(np.zeros((2, 15), bool))
    assert held(table)[0] == [(7, 2), (9, 8)]
