import numpy as np
import pytest
import torch

from chunkllm import ChunkAdapters, ChunkSelection, PooledScorer
from chunkllm.scorers import chunk_scores
from chunkllm.training.distillation import (
    Boundaries,
    distillation_loss,
    future_attention,
    lesson_scores,
    make_lesson,
    missing_by_score,
    missing_mass,
)
from chunkllm.training.lessons import Piece, ReadingOptions, read_piece
from tests.chunkllm.conftest import VOCAB, Stops, cache_name, cache_of
from tests.conftest import make_model

HEADS, GROUPS, WIDTH, SCALING = 4, 2, 8, 0.3
ENDS = torch.tensor([2, 3, 9, 15, 16, 25, 31])  # tokens 32 to 35 are in a chunk that has not ended
CHOSEN = torch.tensor([1, 3, 5])
TOKENS = 36


@pytest.fixture
def boundaries():
    return Boundaries(ENDS, CHOSEN)


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(n, TOKENS, WIDTH, generator=generator) for n in (HEADS, GROUPS))


def dense(queries, keys):
    """Full attention [H, T, T], the plain way."""
    out = torch.zeros(HEADS, TOKENS, TOKENS)
    for head in range(HEADS):
        for at in range(TOKENS):
            logits = keys[head // (HEADS // GROUPS), : at + 1] @ queries[head, at] * SCALING
            out[head, at, : at + 1] = logits.softmax(-1)
    return out


def spans():
    return [(0 if i == 0 else int(ENDS[i - 1]) + 1, int(end) + 1) for i, end in enumerate(ENDS)]


@pytest.mark.parametrize("block", [1, 5, 256])
def test_the_target_is_full_attention_summed_over_chunks(text, boundaries, block, monkeypatch):
    monkeypatch.setattr("chunkllm.training.distillation._BLOCK", block)
    attention = dense(*text)
    wanted = torch.zeros(len(CHOSEN), len(ENDS))
    for row, number in enumerate(CHOSEN.tolist()):
        start, stop = spans()[number + 1]
        for chunk in range(number + 1):
            wanted[row, chunk] = attention[:, start:stop, slice(*spans()[chunk])].sum(-1).mean()
    got = future_attention(*text, boundaries, SCALING)
    torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
    assert bool((got.sum(-1) < 1).all())


def test_a_lesson_keeps_the_last_queries_and_the_chunks_keys(text, boundaries):
    queries, keys = text
    lesson = make_lesson(queries, keys, boundaries, 4, SCALING)
    assert lesson.queries.shape == (3, HEADS, 4, WIDTH)
    for row, number in enumerate(CHOSEN.tolist()):
        end = int(ENDS[number])
        assert torch.equal(lesson.queries[row], queries[:, [max(end - back, 0) for back in (3, 2, 1, 0)]])
    for chunk, (start, stop) in enumerate(spans()):
        torch.testing.assert_close(lesson.statistics.mean[0, :, chunk], keys[:, start:stop].mean(1))
        wanted = keys[:, start:stop].var(1, unbiased=False)
        torch.testing.assert_close(lesson.statistics.variance[0, :, chunk], wanted, atol=1e-5, rtol=1e-4)
        assert torch.equal(lesson.statistics.last[0, :, chunk], keys[:, stop - 1])


def test_scores_of_many_boundaries_are_those_of_each_alone(text, boundaries):
    """Chunks behind a boundary must be as if they were not there: at inference they are not."""
    scorer = PooledScorer(WIDTH, queries=2, scaling=SCALING)
    lesson = make_lesson(*text, boundaries, 4, SCALING)
    got = lesson_scores(scorer, 0, lesson, boundaries)
    for row, number in enumerate(CHOSEN.tolist()):
        known = Boundaries(ENDS[: number + 2], CHOSEN[row : row + 1])
        stop = int(ENDS[number + 1]) + 1
        alone = make_lesson(text[0][:, :stop], text[1][:, :stop], known, 4, SCALING)
        torch.testing.assert_close(got[row, : number + 1], lesson_scores(scorer, 0, alone, known)[0, : number + 1])
        assert bool((got[row, number + 1 :] == 0).all())


def test_boundaries_say_how_far_and_how_free(boundaries):
    assert boundaries.distances()[1].tolist() == [14, 13, 7, 1, 1, 1, 1]
    assert boundaries.chunks().lengths[1].tolist() == [3, 1, 6, 6, 0, 0, 0]
    # At token 15, with 2 sinks and 6 local tokens (10 to 15), the chunks 3 to 3 and 4 to 9 may be dropped.
    assert boundaries.free(2, 6)[1].tolist() == [0, 1, 6, 0, 0, 0, 0]
    assert boundaries.free(2, 8)[1].tolist() == [0, 1, 0, 0, 0, 0, 0]
    assert boundaries.free(0, 1)[1].tolist() == [3, 1, 6, 0, 0, 0, 0]


def test_the_loss_is_the_divergence_over_what_may_be_dropped():
    scores = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.25, 0.25, 0.25, 0.25]])
    target = torch.tensor([[0.4, 0.1, 0.3, 0.1], [0.0, 0.9, 0.0, 0.0]])
    free = torch.tensor([[0, 2, 5, 0], [3, 0, 1, 1]])
    share = np.array([0.25, 0.75])
    wanted = 0.4 * float((share * np.log(share / 0.5)).sum()) / 2  # the second boundary has nothing to lose
    assert float(distillation_loss(scores, target, free)) == pytest.approx(wanted, abs=1e-6)
    assert float(distillation_loss(target, target, free)) == pytest.approx(0, abs=1e-6)
    assert float(distillation_loss(scores, target, torch.zeros_like(free))) == 0


@pytest.mark.parametrize("width", [0, 4])
@pytest.mark.parametrize("strength", [1, 40])
def test_gradients_are_finite_where_chunks_do_not_exist_or_weigh_nothing(text, boundaries, width, strength):
    queries, keys = text[0] * strength, text[1] * strength  # at 40, most scores are 0
    adapters = ChunkAdapters.for_model(make_model(8), width)
    lesson = make_lesson(queries, keys, boundaries, 4, SCALING)
    scores = lesson_scores(adapters.scorer(), 1, lesson, boundaries)
    distillation_loss(scores, lesson.target, boundaries.free(1, 4)).backward()
    grads = [parameter.grad for parameter in (adapters.query, adapters.key, adapters.gains)]
    assert all(bool(grad.isfinite().all()) for grad in grads)
    assert bool((adapters.gains.grad[1] != 0).all()) or strength > 1
    assert bool((adapters.gains.grad[0] == 0).all())  # of the other layer


def test_untrained_adapters_are_the_pooled_score(text, boundaries):
    model = make_model(8)
    adapters = ChunkAdapters.for_model(model, 4)
    scaling = adapters.config.shape.scaling
    lesson = make_lesson(*text, boundaries, 4, scaling)
    pooled = PooledScorer(WIDTH, 4, scaling)
    torch.testing.assert_close(
        lesson_scores(adapters.scorer(), 0, lesson, boundaries), lesson_scores(pooled, 0, lesson, boundaries)
    )


@pytest.mark.parametrize("way", ["pooled", "trained"])
def test_scores_are_those_that_a_cache_computes(llama, monkeypatch, way):
    """What is taught and what selects must be one thing: chunks, distances, queries, and the arithmetic."""
    adapters = ChunkAdapters.for_model(llama, 4)
    with torch.no_grad():
        for parameter in (adapters.key, adapters.gains):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    scorer = adapters.scorer() if way == "trained" else PooledScorer(8)
    ids = torch.randint(1, VOCAB, (120,), generator=torch.Generator().manual_seed(2))
    options = ReadingOptions(context=120, boundaries=5, max_chunk=6, local=6, sinks=0)
    reading = read_piece(llama, Piece(ids.numpy(), (ids % 5 == 0).numpy()), options, 0)
    seen = []

    def spy(scorer, layer, *arguments):
        seen.append((layer, chunk_scores(scorer, layer, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr("chunkllm.contiguous.cache.chunk_scores", spy)
    for row, number in enumerate(reading.boundaries.chosen.tolist()):
        end = int(reading.boundaries.ends[number])
        chooser = ChunkSelection(scorer=scorer, budget=16, local=6, sinks=0, max_chunk=6)
        with chooser.attach(llama, Stops()), torch.no_grad():
            cache = cache_of(llama(ids[None, : end + 1], use_cache=True))
            llama(ids[None, end + 1 : end + 2], **{cache_name(llama): cache})
        assert [layer for layer, _ in seen] == list(reading.lessons)
        for layer, scores in seen:
            wanted = lesson_scores(scorer, layer, reading.lessons[layer], reading.boundaries)[row, : number + 1]
            torch.testing.assert_close(scores[0], wanted, atol=1e-6, rtol=1e-4)
        seen.clear()


def test_missing_mass_by_hand():
    ranks = torch.tensor([[3.0, 9.0, 2.0, 1.0]])
    target = torch.tensor([[0.1, 0.5, 0.2, 0.05]])
    free = torch.tensor([[2, 0, 3, 4]])  # the second stays anyway
    lost = {b: float(missing_mass(ranks, target, free, torch.tensor([b]))) for b in (0, 2, 4, 5, 8, 9)}
    assert lost == pytest.approx({0: 0.35, 2: 0.25, 4: 0.25, 5: 0.05, 8: 0.05, 9: 0})


def test_full_attention_itself_loses_least(text, boundaries):
    target = future_attention(*text, boundaries, SCALING)
    best = missing_by_score(target, target, boundaries, 1, 4, 0.6)
    worst = missing_by_score(-target, target, boundaries, 1, 4, 0.6)
    assert 0 < best < worst
    assert missing_by_score(target, target, boundaries, 1, 4, 1.0) == 0
