import pytest
import torch

from experiments.long_context import bench, lossless
from experiments.long_context.lossless import DEFAULT, DENSE, DRAFTING, LOOKUP, LOSSLESS, SAMPLED, SELECTED, Setting
from tests.chunkllm.conftest import Stops, prompts, tiny_model

SETTING = Setting(tokens=12, budget=70 + 8, rounds=2)


def test_every_way_is_measured_behind_a_text():
    ids, _ = prompts((120,))
    with torch.inference_mode():
        records = {each.way: each for each in lossless.on_text("a text", ids, tiny_model(), Stops(), None, SETTING)}
    assert list(records) == [DEFAULT, DENSE, SELECTED, LOSSLESS, LOOKUP, DRAFTING, SAMPLED]
    for way in (DEFAULT, DENSE, LOSSLESS, LOOKUP, DRAFTING):
        assert records[way].same == records[way].tokens == 12
    assert {len(records[way].seconds) for way in (DEFAULT, LOSSLESS, LOOKUP)} == {2}
    assert all(0 < records[way].acceptance <= 1 for way in (DRAFTING, SAMPLED))
    shown = {figure.what: figure.shown for figure in lossless.figures_of(list(records.values()))}
    assert shown["a text, 120 tokens: lossless, tokens as full attention's"] == "12 of 12"
    assert "a text, 120 tokens: lossless, against best dense" in shown


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_random_contexts_accept_as_they_are_told(monkeypatch, acceptance):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(bench.SHAPES, "tiny", shape | {"num_key_value_heads": 2, "vocab_size": 64})
    options = bench.BenchOptions("tiny", torch.float32, (200,))
    with lossless._always_drafting():
        records = {each.way: each for each in lossless.on_random(options, acceptance, SETTING, lambda _: None)}
    assert records[LOSSLESS].acceptance == acceptance
    assert records[LOSSLESS].tokens == records[DEFAULT].tokens == 12
