"""Selection over a paged cache against a plain account of each request by itself."""

import random

import numpy as np
import pytest
import torch

from tests.chunkllm.paged.engine import (
    BLOCK,
    BUDGET,
    ROWS,
    Engine,
    L,
    NoLooking,
    Request,
    Schedule,
    V,
    checker,
    step_of_one,
)


@pytest.fixture
def engine(monkeypatch):
    def made(pieces=1, **options):
        monkeypatch.setattr("chunkllm.paged.blocks._TOKENS_PER_PIECE", BLOCK // pieces)
        return Engine(**options)

    return made


@pytest.mark.parametrize("rests", [False, True])
@pytest.mark.parametrize("slots", [None, ROWS])
@pytest.mark.parametrize(("pieces", "fixed_shapes"), [(1, False), (2, False), (4, False), (2, True)])
@pytest.mark.parametrize("seed", range(2))
def test_requests_that_come_and_go_get_what_each_would_get_alone(engine, pieces, fixed_shapes, slots, rests, seed):
    engine = engine(pieces, blocks=46, seed=seed, fixed_shapes=fixed_shapes, slots=slots, rests=rests)
    seen = []
    check = checker(pieces, seen)
    schedule = Schedule(engine, random.Random(seed), rows=ROWS, requests=40)
    schedule.run(lambda batch: engine.step(batch, check))
    assert schedule.preempted and schedule.shared and len(seen) > 200
    assert sum(seen) / len(seen) < 0.9
    assert engine.quiet > 5 if engine.rests else not engine.quiet


@pytest.mark.parametrize(("pieces", "fixed_shapes"), [(1, False), (1, True), (2, True)])
@pytest.mark.parametrize(("rows", "rests"), [(64, False), (64, True), (256, True)])
def test_of_many_rows_each_gets_what_it_would_get_alone(engine, pieces, fixed_shapes, rows, rests):
    engine = engine(pieces, blocks=7 * rows, fixed_shapes=fixed_shapes, rows=rows, slots=rows, rests=rests)
    seen, sizes = [], []
    check = checker(pieces, seen)

    def step(batch):
        sizes.append(len(batch))
        engine.step(batch, check)

    schedule = Schedule(engine, random.Random(rows), rows=rows, requests=rows + rows // 4)
    schedule.run(step)
    assert schedule.preempted and schedule.shared and max(sizes) > 0.8 * rows
    assert len(seen) > 5 * rows and sum(seen) / len(seen) < 0.9


@pytest.mark.parametrize("rows", [4, 128, 256])
def test_with_fixed_shapes_every_row_of_a_batch_selects_within_a_block(engine, rows):
    engine = engine(blocks=12 * rows, fixed_shapes=True, rows=rows, slots=rows)
    prompt, firsts = 9 * BLOCK, {}
    batch = [Request([i % V for i in range(row, row + 12 * BLOCK)], prompt) for row in range(rows)]

    def check(engine, batch, readings):
        for row, (request, _) in enumerate(batch):
            if int(readings[row][1].sum()) < L * (request.held + 1):
                firsts.setdefault(row, request.held - prompt)

    for request in batch:
        engine.admit(request)
    engine.step([(request, prompt) for request in batch], lambda *_: None)
    for _ in range(BLOCK):
        engine.step([(request, 1) for request in batch], check)
    assert len(firsts) == rows and max(firsts.values()) < BLOCK
    assert (max(firsts.values()) > 0) == (rows > 4)  # they take turns


@pytest.mark.parametrize("begins_with", [100, 30])  # tokens of the first step
@pytest.mark.parametrize(("slots", "rests"), [(None, False), (ROWS, False), (ROWS, True)])
def test_with_fixed_shapes_nothing_waits_for_the_device(engine, slots, rests, begins_with):
    engine = engine(blocks=40, fixed_shapes=True, slots=slots, rests=rests)
    selection = engine.selection
    table = torch.arange(20, dtype=torch.int32)
    selected, steps = [], [(0, begins_with), *((begins_with + i, 1) for i in range(40))]
    for held, count in steps:
        ids = torch.randint(0, V, (count,))
        step = step_of_one(table, held, count, BUDGET, slots=None if slots is None else np.array([1]))
        keys, queries, ends = engine.keys[:, ids], engine.queries[:, ids], engine.ends[ids]
        with NoLooking():
            reading = selection.begin(step)
            for layer in range(L):
                selection.add(layer, keys[layer], queries[layer])
                if layer == 0:
                    selection.note_ends(ends)
        engine.cache.flatten(1, 2)[:, held : held + count] = keys
        selected.append(reading is not None and int(reading.lengths.sum()) < L * (held + count))
    is_long = [count == 1 and held + 1 > BUDGET + BLOCK for held, count in steps]  # so much that blocks are left out
    assert not any(got and held + count <= BUDGET for got, (held, count) in zip(selected, steps, strict=True))
    assert all(got or not wanted for got, wanted in zip(selected, is_long, strict=True)) and sum(is_long) > 10
