"""Steps of single tokens that are captured once and replayed: each row reads what it would read alone."""

import random

import pytest
import torch

from chunkllm import ChunkError
from tests.chunkllm.paged.engine import (
    BLOCK,
    ROWS,
    Engine,
    M,
    NoLooking,
    Recording,
    Request,
    Schedule,
    V,
    checker,
    of_row,
    reads_everything,
)

PADDED = ROWS + 3  # rows that a step can have


class Replaying(Engine):
    """Replays the calls of steps of single tokens, with rows that only pad, now and then."""

    def __init__(self, **options):
        super().__init__(blocks=46, slots=ROWS, rows=PADDED, replays=True, **options)
        self.graphs = {rows: self.captured(rows) for rows in (PADDED, 3, 1)}
        self.replayed, self.pads_with = 0, None

    def captured(self, rows):
        ids = torch.zeros(rows, dtype=torch.long)
        reading = self.selection.capture(rows)
        with Recording() as graph:
            self.tell(ids)
            read = [each.clone() for each in reading]  # by attention
        return graph, ids, read

    def replay(self, ids):
        """What each layer reads, by the smallest graph that has rows for these tokens."""
        rows = min(rows for rows in self.graphs if rows >= len(ids))
        graph, given, read = self.graphs[rows]
        given[:] = self.choose.randrange(V) if self.pads_with is None else self.pads_with
        given[: len(ids)] = ids
        graph.replay()
        return read

    def step(self, batch, check):
        step, ids = self.step_of(batch)
        with NoLooking():
            reading = self.selection.begin(step)
        readings = [None if reading is None else of_row(reading, row) for row in range(len(batch))]
        if len(ids) == len(batch) and self.choose.random() < 0.8:
            tables, lengths = self.replay(ids)
            readings = [(tables[:, row], lengths[:, row]) for row in range(len(batch))]
            assert not lengths[:, len(batch) :].any()
            self.replayed += 1
        else:
            self.tell(ids)
        check(self, batch, readings)
        self.done(batch)


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_requests_that_come_and_go_get_what_each_would_get_alone(monkeypatch, pieces, rests, seed):
    monkeypatch.setattr("chunkllm.paged.blocks._TOKENS_PER_PIECE", BLOCK // pieces)
    engine, seen = Replaying(seed=seed, rests=rests), []
    check = checker(pieces, seen)
    schedule = Schedule(engine, random.Random(seed), rows=ROWS, requests=40)
    schedule.run(lambda batch: engine.step(batch, check))
    assert schedule.preempted and schedule.shared and engine.replayed > 100
    assert len(seen) > 200 and sum(seen) / len(seen) < 0.9


@pytest.fixture
def serving():
    """An engine with one request whose prompt is read, and a way to have it write a token."""
    engine, prompt = Replaying(rests=True), 9 * BLOCK
    request = Request([i % (V - 1) for i in range(14 * BLOCK)], prompt)
    engine.admit(request)
    engine.step([(request, prompt)], lambda *_: None)

    def write(check=lambda *_: None):
        engine.step([(request, 1)], check)

    return engine, request, write


def test_a_step_that_was_never_replayed_is_not_trusted(serving):
    engine, request, write = serving
    seen = []

    def note(engine, batch, readings):
        seen.append(reads_everything(request, 1, readings[0]))

    for _ in range(M):
        write(note)
    assert not seen[-1]
    step, _ = engine.step_of([(request, 1)])
    engine.selection.begin(step)
    engine.done([(request, 1)])
    seen.clear()
    for _ in range(M):
        write(note)
    assert all(seen)


def test_where_a_step_cannot_begin_those_who_replay_read_everything(serving, monkeypatch):
    engine, request, write = serving

    def plain_step(error):
        step, ids = engine.step_of([(request, 1)])
        with pytest.raises(error):
            engine.selection.begin(step)
        engine.selection.read_all(step.block_table, step.lengths)
        tables, lengths = engine.replay(ids)
        assert reads_everything(request, 1, (tables[:, 0], lengths[:, 0]))
        engine.done([(request, 1)])

    for _ in range(M):
        write()
    with monkeypatch.context() as patch:
        patch.setattr(engine.selection, "_expect", lambda *_: 1 / 0)
        plain_step(ZeroDivisionError)
    plain_step(ChunkError)  # the gap
    seen = []
    for _ in range(2 * M):
        write(lambda _, __, readings: seen.append(reads_everything(request, 1, readings[0])))
    assert seen[0] and not seen[-1]  # its keys were read again


def test_what_pads_a_batch_changes_nothing_whatever_it_holds(serving):
    engine, request, write = serving
    engine.queries[:, -1] = engine.keys[:, -1] = torch.nan
    engine.pads_with = V - 1
    engine.graphs = {PADDED: engine.graphs[PADDED]}
    seen = []
    for _ in range(2 * M):
        write(lambda _, __, readings: seen.append(reads_everything(request, 1, readings[0])))
    assert not any(seen[M:])
