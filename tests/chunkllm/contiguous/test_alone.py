"""What a row keeps is what it keeps alone, whatever stands beside it."""

import numpy as np
import pytest
import torch

from chunkllm import ChunkCache, ChunkSelection
from chunkllm.contiguous.layer import ChunkLayer
from tests.chunkllm.conftest import Stops, cache_name, cache_of, calibrated, prompts
from tests.chunkllm.contiguous.conftest import SMALL, assert_close, steps_for

LENGTHS, STEPS = (60, 14, 38), 44
MODES = {
    "budget": {"budget": 24},
    "retention": {"retention": 0.5},
    "retention of each step": {"retention": 0.3, "every_step": True},
    "top_k": {"top_k": 3},
    "adaptive": {"budget": 24, "adaptive": True},
    "an adaptive retention": {"retention": 0.5, "adaptive": True},
    "vote": {"retention": 0.5, "vote": True},
    "every_step": {"budget": 24, "every_step": True, "adaptive": True},
    "offload": {"retention": 0.5, "offload": True},
}
ROOMY = ("retention of each step", "an adaptive retention")  # in which all rows select anew before a buffer is full


@torch.no_grad()
def write(model, ids, mask, steps, cache=None):
    """Reads ids [B, T], then steps [B, n] one by one, at the positions that rows have alone: logits [B, n + 1, V]."""
    logits = []
    for new in (ids, *steps.split(1, 1)):
        held = 0 if cache is None else cache.get_seq_length()
        if held:
            mask = torch.cat((mask, mask.new_ones(len(mask), held + new.shape[1] - mask.shape[1])), 1)
        places = (mask.cumsum(1) - 1).clamp(min=0)[:, held:]
        output = model(new, attention_mask=mask, position_ids=places, use_cache=True, **{cache_name(model): cache})
        cache = cache_of(output)
        logits.append(output.logits[:, -1])
    return torch.stack(logits, 1), cache


def attached(model, options):
    adapters = calibrated(model) if options.get("adaptive") else None
    return ChunkSelection(adapters, **SMALL, **options).attach(model, Stops(), record=True)


def kept_by(chunks, row=0, first=0):
    """Of each selection of a row how long it was, and what the layers keep."""
    return [(r.length - first, r.kept[:, first:]) for r in chunks.readings if r.row == row]


def assert_same(got, wanted):
    assert [length for length, _ in got] == [length for length, _ in wanted]
    for (_, kept), (_, alone) in zip(got, wanted, strict=True):
        assert np.array_equal(kept, alone)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_keeps_what_it_keeps_alone(llama, monkeypatch, mode):
    moved, make_room = [], ChunkLayer.make_room
    monkeypatch.setattr("chunkllm.contiguous.layer._BUFFER_STEP", 1)
    monkeypatch.setattr(ChunkCache, "_spare", SMALL["max_chunk"] + 1)  # no more than what a row alone needs
    monkeypatch.setattr(ChunkLayer, "make_room", lambda self, *args: moved.append(self) or make_room(self, *args))
    (ids, mask), steps = prompts(LENGTHS), steps_for(LENGTHS, STEPS)
    with attached(llama, MODES[mode]) as chunks:
        together, _held = write(llama, ids, mask, steps)
        stats = chunks.stats
    assert moved or mode in ROOMY
    alone = {"selections": 0, "boundaries": 0, "read": 0}
    for row, length in enumerate(LENGTHS):
        moved.clear()
        with attached(llama, MODES[mode]) as one:
            logits, _one = write(llama, ids[row : row + 1, -length:], mask[row : row + 1, -length:], steps[row:][:1])
            alone = {name: total + one.stats[name] for name, total in alone.items()}
        assert not moved
        assert_same(kept_by(chunks, row, max(LENGTHS) - length), kept_by(one))
        assert_close(together[row : row + 1], logits)
    assert {name: stats[name] for name in alone} == pytest.approx(alone)


@pytest.mark.parametrize("lengths", [(50, 15), (50,)])
@pytest.mark.parametrize("options", [{"budget": 24}, {"retention": 0.8, "adaptive": True}, {"top_k": 3}])
def test_rows_that_are_repeated_and_reordered_keep_what_each_keeps_alone(llama, lengths, options):
    (ids, mask), steps, later = prompts(lengths), steps_for(lengths, 12), steps_for((1,) * 4, 30, seed=7)
    order = [1, 0, 0, 1] if len(lengths) == 2 else [0] * 4
    with attached(llama, options) as chunks:
        _, cache = write(llama, ids, mask, steps)
        before = len(chunks.readings)
        cache.batch_repeat_interleave(4 // len(lengths))
        cache.reorder_cache(torch.tensor([2, 1, 0, 3]))
        grown = torch.cat((mask, torch.ones_like(steps)), 1)[order]
        together, _held = write(llama, later[:, :1], grown, later[:, 1:], cache)
        readings = chunks.readings[before:]
    for row, parent in enumerate(order):
        length, own = lengths[parent], slice(parent, parent + 1)
        with attached(llama, options) as one:
            all_steps = torch.cat((steps[own], later[row : row + 1]), 1)
            logits, _one = write(llama, ids[own, -length:], mask[own, -length:], all_steps)
        assert_close(together[row : row + 1], logits[:, 13:])
        got = [(r.length - 50 + length, r.kept[:, 50 - length :]) for r in readings if r.row == row]
        assert_same(got, [each for each in kept_by(one) if each[0] >= length + 12])
