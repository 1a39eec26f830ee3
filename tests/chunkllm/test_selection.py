import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllm.selection import Chunks, Rows, choose_tokens, divide, layer_weights, score_per_token, selectable


def chunks_of(rows):
    """Lists of (start, length) as tensors, filled up with length 0."""
    count = max(1, *(len(row) for row in rows))
    filled = torch.tensor([[*row, *[(0, 0)] * (count - len(row))] for row in rows]).view(len(rows), count, 2)
    return Chunks(filled[..., 0], filled[..., 1])


@st.composite
def batches(draw):
    """Rows as a `ChunkTable` has them: chunks without gaps from the first token to the running one."""
    length = draw(st.integers(20, 60))
    sinks, local, longest = draw(st.integers(0, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 8))
    rows, firsts, recents = [], [], []
    for _ in range(draw(st.integers(1, 3))):
        first = draw(st.integers(0, length - 1))
        running = draw(st.integers(0, min(longest - 1, length - first)))
        row, at = [], first
        while at < length - running:
            size = min(draw(st.integers(1, longest)), length - running - at)
            row.append((at, size))
            at += size
        rows.append(row)
        firsts.append(first)
        recents.append(max(local, running))
    stand = Rows(torch.tensor(firsts), torch.full((len(rows),), length), torch.tensor(recents))
    count = chunks_of(rows).starts.shape[1]
    # Whole numbers, so that there are ties.
    ranks = torch.tensor(
        draw(
            st.lists(
                st.lists(st.integers(0, 9), min_size=count, max_size=count), min_size=len(rows), max_size=len(rows)
            )
        )
    ).float()
    least = sinks + max(local, longest)
    return rows, stand, ranks, sinks, draw(st.integers(least, length + 8))


def wanted_tokens(row, rank, first, length, recent, sinks, slots, top_k=None):
    """A row's tokens in plain Python: the sinks, the recent ones, then chunk by chunk, as long as there is room."""
    if length - first <= slots:
        return list(range(first, length))
    inner = [[t for t in range(a, a + n) if first + sinks <= t < length - recent] for a, n in row]
    order = sorted((i for i in range(len(row)) if inner[i]), key=lambda i: (-rank[i], i))[:top_k]
    tokens = [t for i in order for t in inner[i]]
    return [*range(first, first + sinks), *range(length - recent, length), *tokens][:slots]


def choose(batch, top_k=None):
    rows, stand, ranks, sinks, slots = batch
    chunks = selectable(chunks_of(rows), stand, sinks)
    return choose_tokens(ranks, chunks, stand, sinks, slots, top_k)


@settings(max_examples=200, deadline=None)
@given(batches(), st.none() | st.integers(1, 5))
def test_chosen_tokens_are_those_of_brute_force(batch, top_k):
    rows, stand, ranks, sinks, slots = batch
    tokens, valid = choose(batch, top_k)
    assert tokens.shape == valid.shape == (len(rows), slots)
    assert tokens.dtype == torch.int64
    assert valid.dtype == torch.bool
    for i, row in enumerate(rows):
        first, length, recent = (int(x[i]) for x in stand)
        got = tokens[i][valid[i]].tolist()
        # In this order: the chunk that ranks best comes first, and the last one is cut.
        assert got == wanted_tokens(row, ranks[i].tolist(), first, length, recent, sinks, slots, top_k)
        assert not tokens[i][~valid[i]].any()  # places that any storage has


@settings(max_examples=200, deadline=None)
@given(batches())
def test_a_budget_is_spent_exactly_and_sinks_and_recent_tokens_always_stay(batch):
    rows, stand, _, sinks, slots = batch
    tokens, valid = choose(batch)
    for i in range(len(rows)):
        first, length, recent = (int(x[i]) for x in stand)
        got = tokens[i][valid[i]].tolist()
        assert len(got) == len(set(got)) == min(slots, length - first)
        assert set(got) <= set(range(first, length))
        assert set(got) >= set(range(first, min(first + sinks, length))) | set(
            range(max(length - recent, first), length)
        )


@settings(max_examples=50, deadline=None)
@given(batches())
def test_ranks_of_chunks_that_a_row_lacks_are_not_read(batch):
    rows, stand, ranks, sinks, slots = batch
    chunks = selectable(chunks_of(rows), stand, sinks)
    spoiled = ranks.masked_fill(chunks.lengths == 0, torch.nan)
    before, after = (choose_tokens(x, chunks, stand, sinks, slots) for x in (ranks, spoiled))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])


@settings(max_examples=100, deadline=None)
@given(batches())
def test_selectable_is_what_is_neither_sink_nor_recent(batch):
    rows, stand, _, sinks, _ = batch
    left = selectable(chunks_of(rows), stand, sinks)
    for i, row in enumerate(rows):
        first, length, recent = (int(x[i]) for x in stand)
        for j, (start, size) in enumerate(row):
            wanted = [t for t in range(start, start + size) if first + sinks <= t < length - recent]
            begin, count = int(left.starts[i, j]), int(left.lengths[i, j])
            assert list(range(begin, begin + count)) == wanted
        assert not left.lengths[i, len(row) :].any()


def test_scores_per_token():
    got = score_per_token(torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[2, 10, 0]]))
    torch.testing.assert_close(got, torch.tensor([[0.25, 0.05, 0.0]]))


def divided(tokens, weights, most):
    return divide(torch.tensor([tokens]), torch.as_tensor(weights), torch.tensor([most]))[0].tolist()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=8), st.integers(0, 60), st.integers(1, 50))
def test_a_budget_is_divided_in_proportion_and_no_layer_gets_more_than_it_can_use(weights, tokens, most):
    got = divided(tokens, weights, most)
    layers = len(weights)
    if tokens >= most:
        assert got == [tokens] * layers
        return
    assert max(got) <= most
    assert tokens * layers - layers <= sum(got) <= tokens * layers
    open_ = [i for i in range(layers) if got[i] < most]
    for i in open_:
        for j in open_:
            assert got[i] * weights[j] == pytest.approx(got[j] * weights[i], abs=1.01 * (weights[i] + weights[j]))
        for j in set(range(layers)) - set(open_):
            assert weights[j] * (got[i] + 1) >= weights[i] * most * (1 - 1e-9)  # who got all deserved no less


def test_sensitive_layers_get_more_by_the_root_and_none_is_starved():
    weights = layer_weights([4e-3, 1e-3, 0.0, 0.0])
    assert weights[0] == pytest.approx(2 * weights[1])
    assert weights[2] == weights[3] == pytest.approx(0.5)
    assert layer_weights([0.0, 0.0]).tolist() == [0.5, 0.5]
    assert divided(10, layer_weights([1e-3] * 3), 100) == [10, 10, 10]


def test_rows_are_divided_each_by_itself():
    weights = torch.tensor([3.0, 1.0, 1.0])
    together = divide(torch.tensor([10, 40, 50]), weights, torch.tensor([100, 60, 40]))
    assert together.tolist() == [divided(10, weights, 100), divided(40, weights, 60), divided(50, weights, 40)]
