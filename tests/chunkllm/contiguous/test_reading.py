import pytest
import torch

from chunkllm import ChunkError, ChunkSelection
from tests.chunkllm.conftest import Stops, calibrated, prompts
from tests.chunkllm.contiguous.conftest import SMALL, generate, logits_of, read, steps_for
from tests.chunkllm.contiguous.test_choices import Spy


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("lengths", [(50,), (50, 20, 37)])
def test_readings_are_what_the_steps_attended_to(llama, monkeypatch, lengths, adaptive):
    ids, mask = prompts(lengths)
    spy = Spy(monkeypatch)
    chooser = ChunkSelection(calibrated(llama) if adaptive else None, **SMALL, budget=24, adaptive=adaptive)
    with chooser.attach(llama, Stops(), record=True) as chunks:
        _, cache = read(llama, ids, mask, steps_for(lengths))
    attended = [list(spy.places(layer)) for layer in cache.full_layers]
    assert {reading.row for reading in chunks.readings} == set(range(len(lengths)))
    assert len(chunks.readings) == chunks.stats["selections"] > 2 * len(lengths)
    for reading in chunks.readings:
        step = reading.length - max(lengths)
        assert reading.kept.shape == (len(attended), reading.length)
        for kept, of_layer in zip(reading.kept, attended, strict=True):
            places = sorted(of_layer[step][reading.row])
            assert places == [*kept.nonzero()[0], reading.length]  # and the token that attends


def test_recording_changes_nothing(llama):
    texts = []
    for record in (False, True):
        with ChunkSelection(**SMALL, budget=16).attach(llama, Stops(), record=record) as chunks:
            texts.append(logits_of(generate(llama, (50, 20))))
    assert torch.equal(*texts)
    assert chunks.readings


def test_without_a_record_there_is_nothing_to_look_at(llama):
    with ChunkSelection(**SMALL, budget=16).attach(llama) as chunks:
        generate(llama, (50,))
    with pytest.raises(ChunkError, match="attach\\(model, tokenizer, record=True\\)"):
        _ = chunks.readings
