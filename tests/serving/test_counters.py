"""What of requests and steps is counted, and what else goes on when it cannot be."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from chunkllm.paged.selection import Step
from chunkllm.paged.tables import Reading
from decoding.vllm import counts, fallbacks
from decoding.vllm.counters import ChunkCounts
from decoding.vllm.counts import Counting
from decoding.vllm.metrics import (
    FALLBACKS,
    KINDS,
    LAMBDA,
    REQUESTS,
    SELECTIONS,
    TEMPERATURE,
    TOKENS_HELD,
    TOKENS_READ,
)
from decoding.vllm.temperatures import PromptTemperatures
from decoding.vllm.v1 import StyleRows
from decoding.vllm.v2 import StyleSlots
from tests.serving.conftest import FakeFrame, fake_temperature, sampling
from tests.serving.test_v1_rows import batch_update
from tests.serving.test_v2_slots import request_states


class Listing:
    """Counts in memory: of a counter its value, of a histogram the values."""

    def __init__(self):
        self.found = {}

    def add(self, metric, value=1.0, label=None):
        before = self.found.get((metric, label), [] if metric.borders else 0)
        self.found[metric, label] = [*before, value] if metric.borders else before + value

    def of(self, metric):
        return {label: value for (each, label), value in self.found.items() if each == metric}


def test_every_request_counts_also_of_prompts_that_are_remembered(selector):
    listing = Listing()
    choose = PromptTemperatures(selector, FakeFrame(), "medium", counts=Counting(listing))
    choose([[1, 2], [3], None])
    choose([[3]])
    choose([])
    wanted = {"unknown": [1.75]}
    for value in map(fake_temperature, ([1, 2], [3], [3])):
        wanted.setdefault(KINDS[int(8 * value) % 6], []).append(value)
    assert listing.of(TEMPERATURE) == wanted


class Full:
    def add(self, metric, value=1.0, label=None):
        raise OSError("no space left on device")


def test_what_cannot_be_counted_stops_no_engine(selector, styles, caplog):
    choose = PromptTemperatures(selector, FakeFrame(), "medium", counts=Counting(Full()))
    assert float(choose([[3]])[0]) == fake_temperature([3])
    assert float(choose([[4]])[0]) == fake_temperature([4])
    rows = StyleRows(styles, torch.device("cpu"), Counting(Full()))
    rows.update(batch_update(added=[(0, sampling({"style": "plain"}), [1], [])]))
    chunks = ChunkCounts(2, Counting(Listing()), torch.device("cpu"))
    chunks.add(None, None, None)
    chunks.add(None, None, None)
    assert caplog.text.count("no longer counted") == 3  # by each of the three, once


@pytest.mark.parametrize("folder", ["not there", None])
def test_without_a_folder_nothing_is_counted(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    monkeypatch.delenv(counts.COUNTS_VARIABLE, raising=False)
    if folder is not None:
        monkeypatch.setenv(counts.COUNTS_VARIABLE, str(tmp_path / folder))
    counting = counts.counts_of_process.__wrapped__()
    counting.add(REQUESTS, 1, "plain")
    assert not counting
    assert ("no longer counted" in caplog.text) == (folder is not None)


REQUESTED = [  # arguments of requests, and what they count as
    (None, {"none": None}),
    ({"style": "plain", "lambda": 0.3}, {"plain": 0.3}),
    ({"style": "long"}, {"long": 0.3}),  # its own λ
    ({"style": ["plain", "short"], "lambda": [0.5, 0.1]}, {"plain": 0.5, "short": 0.1}),
    ({"style": ["plain", "short"], "lambda": [0, 0.1]}, {"short": 0.1}),
    ({"style": "one", "lambda": 0}, {"none": None}),
    ({"style": "off"}, {"none": None}),
    ({"style": "plain", "lambda": 0.3}, {"plain": 0.3}),
]


def wanted_counts(styles):
    requests, lambdas = dict.fromkeys((*styles.names, "none"), 0), {}
    for _, chosen in REQUESTED:
        for name, value in chosen.items():
            requests[name] += 1
            if value is not None:
                lambdas.setdefault(name, []).append(value)
    return requests, lambdas


def test_v1_counts_each_request_once_by_its_styles(styles):
    listing = Listing()
    rows = StyleRows(styles, torch.device("cpu"), Counting(listing))
    outputs = [[] for _ in REQUESTED]
    added = [(row, sampling(each), [1], outputs[row]) for row, (each, _) in enumerate(REQUESTED)]
    rows.update(batch_update(added=added[:3]))
    rows.update(batch_update(added=added[3:], removed=[0]))
    rows.update(None)
    for output in outputs:
        output.append(5)
    rows.update(batch_update(removed=range(8), added=added))  # preempted, and back
    assert (listing.of(REQUESTS), listing.of(LAMBDA)) == wanted_counts(styles)


def test_v2_counts_each_request_once_by_its_styles(styles):
    listing, states = Listing(), request_states()
    slots = StyleSlots(styles, states, Counting(listing))
    for number, (each, _) in enumerate(REQUESTED):
        slot = number % 6
        states.prompt_len.np[slot] = states.prefill_len.np[slot] = 3
        slots.add(slot, sampling(each))
        states.prefill_len.np[slot] += 1  # preempted behind its first token, and back
        slots.add(slot, sampling(each))
    assert (listing.of(REQUESTS), listing.of(LAMBDA)) == wanted_counts(styles)


@pytest.mark.parametrize(("steps_at_once", "counted", "chosen"), [(None, 95, 32), (32, 32, 11)])
def test_tokens_read_are_those_of_rows_that_are_over_their_budget(steps_at_once, counted, chosen):
    """Of six rows two are long and write: one of them has no selection yet, and reads everything."""
    listing, layers = Listing(), 4
    chunks = ChunkCounts(layers, Counting(listing), torch.device("cpu"), steps_at_once)
    lengths = torch.tensor([100, 50, 300, 200, 20, 0])
    is_prompt = np.array([False, False, True, False, False, False])
    budgets = np.array([64, 64, 64, 128, 64, 64])
    ones, most = np.ones(6, int), lengths.numpy()
    step = Step(lengths[:, None], lengths, torch.arange(7), torch.arange(6), ones, is_prompt, budgets, most)
    read = torch.stack([torch.tensor([60 + layer, 50, 300, 200, 20, 0]) for layer in range(layers)])
    selections = torch.zeros((), dtype=torch.long)
    for number in range(96):
        selections += number % 3 == 0
        reading = None if number == 5 else Reading(read[:, :, None], read)
        most = step.most * (number != 7)
        chunks.add(step._replace(most=most), reading, selections)  # one is not looked at
    held, seen = (listing.of(each)[None] for each in (TOKENS_HELD, TOKENS_READ))
    assert (held, seen) == (300 * counted, 300 + 261.5 * (counted - 1))
    assert listing.of(SELECTIONS) == {None: chosen}


def test_what_failed_is_counted_by_part(tmp_path, monkeypatch):
    listing = Listing()
    monkeypatch.setattr(fallbacks, "counts_of_process", lambda: Counting(listing))
    monkeypatch.setattr(fallbacks, "counts", type(fallbacks.counts)())
    for part in ("style", "temperature", "style"):
        try:
            raise ValueError(part)
        except ValueError:
            fallbacks.fell_back(part)
    assert listing.of(FALLBACKS) == fallbacks.counts == {"style": 2, "temperature": 1}


def test_one_worker_of_an_engine_counts(monkeypatch):
    monkeypatch.setattr(counts, "counts_of_process", lambda: Counting(Listing()))
    for workers, alike, counting in ((1, 1, [0]), (4, 4, [0]), (8, 2, [6])):
        config = [SimpleNamespace(rank=rank, world_size=workers, tensor_parallel_size=alike) for rank in range(workers)]
        assert [each.rank for each in config if counts.counts_of_rank(each)] == counting


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_selections_are_counted_where_nothing_waits_for_the_device(fixed_shapes):
    """Without ends of chunks, a row chooses anew behind each block of 8 tokens, and before its first one."""
    pytest.importorskip("hypothesis")
    from tests.chunkllm.paged.engine import step_of_one
    from tests.chunkllm.paged.test_selection import BUDGET, Engine, L, NoLooking

    engine, listing = Engine(40, fixed_shapes=fixed_shapes), Listing()
    chunks = ChunkCounts(L, Counting(listing), torch.device("cpu"), 4)
    table, selection = torch.arange(20, dtype=torch.int32), engine.selection
    for held, count in [(0, 100), *((100 + i, 1) for i in range(24))]:
        step = step_of_one(table, held, count, BUDGET)
        reading = selection.begin(step)
        with NoLooking():
            chunks.add(step, reading, selection.selections)
        selection.note_ends(None)
        ids = torch.arange(held, held + count) % len(engine.ends)
        for layer in range(L):
            selection.add(layer, engine.keys[layer, ids], engine.queries[layer, ids])
    assert int(selection.selections) == 1 + len({104, 112, 120})
    assert listing.of(SELECTIONS) == {None: 3}  # 25 steps, told in fours, a four later: the first 20
    assert listing.of(TOKENS_HELD) == {None: sum(range(101, 120))}
