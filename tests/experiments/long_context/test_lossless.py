import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from chunkllm import ChunkSelection
from chunkllm.models import cache_argument
from chunkllm.selection import Chunks
from decoding.errors import DecodingError
from decoding.models import DEFAULT_MODEL
from decoding.style.source import StyleSource
from experiments.long_context import bench, lossless
from experiments.long_context.lossless import (
    ATTENDED,
    ATTENDED_SAMPLED,
    DEFAULT,
    DENSE,
    DRAFTING,
    LOOKUP,
    LOSSLESS,
    SAMPLED,
    SELECTED,
    Setting,
)
from tests.chunkllm.conftest import Stops, prompts, tiny_model

SETTING = Setting(tokens=12, budget=70 + 8, rounds=2)


def test_every_way_is_measured_behind_a_text():
    ids, _ = prompts((120,))
    with torch.inference_mode():
        records = {each.way: each for each in lossless.on_text("a text", ids, tiny_model(), Stops(), None, SETTING)}
    assert list(records) == [DEFAULT, SELECTED, DENSE, LOSSLESS, LOOKUP, DRAFTING, SAMPLED, ATTENDED, ATTENDED_SAMPLED]
    for way in (DEFAULT, DENSE, LOSSLESS, LOOKUP, DRAFTING, ATTENDED):
        assert records[way].same == records[way].tokens == 12
    assert {len(records[way].seconds) for way in (DEFAULT, LOSSLESS, LOOKUP)} == {2}
    assert all(0 < records[way].acceptance <= 1 for way in (DRAFTING, SAMPLED, ATTENDED, ATTENDED_SAMPLED))
    shown = {figure.what: figure.shown for figure in lossless.figures_of(list(records.values()))}
    assert shown["a text, 120 tokens: lossless, tokens as full attention's"] == "12 of 12"
    assert "a text, 120 tokens: lossless, against best dense" in shown


@pytest.mark.parametrize("acceptance", [0.0, 1.0])
def test_random_contexts_accept_as_they_are_told(monkeypatch, acceptance):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(bench.SHAPES, "tiny", shape | {"num_key_value_heads": 2, "vocab_size": 64})
    options = bench.BenchOptions("tiny", torch.float32, (200,))
    with lossless.always_drafting():
        records = {each.way: each for each in lossless.on_random(options, acceptance, SETTING, lambda _: None)}
    assert records[LOSSLESS].acceptance == acceptance
    assert records[LOSSLESS].tokens == records[DEFAULT].tokens == 12


def test_an_interrupted_run_keeps_what_was_measured(tmp_path):
    ids, _ = prompts((120,))
    out = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt), lossless._reported({"model": "tiny"}, SETTING, out) as records:
        with torch.inference_mode():
            records += lossless.on_text("a text", ids, tiny_model(), Stops(), None, SETTING)
        raise KeyboardInterrupt
    saved = json.loads(out.read_text())
    assert saved["model"] == "tiny" and len(saved["records"]) == 9
    with pytest.raises(KeyboardInterrupt), lossless._reported({}, SETTING, out):
        raise KeyboardInterrupt
    assert json.loads(out.read_text()) == saved  # nothing was, and nothing is lost


def test_a_text_that_is_too_short_is_refused_before_any_other_is_read(tmp_path, monkeypatch):
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text("word " * 300)
    short.write_text("word " * 30)
    monkeypatch.setattr(lossless, "load_tokenizer", lambda *_: None)
    monkeypatch.setattr(lossless, "tokenize", lambda documents, _: [np.arange(len(each.split())) for each in documents])
    monkeypatch.setattr(lossless, "load_model", lambda *_: pytest.fail("no model is needed to see that"))
    sources = [StyleSource.parse(str(file)) for file in (long, short)]
    with pytest.raises(DecodingError, match="short has 30 tokens: give a text of 200"):
        lossless.measure_texts(sources, (200,), DEFAULT_MODEL, "float32", None, SETTING, None)


def test_true_attention_is_that_of_loops():
    model, scaling = tiny_model(), 0.5
    ids, _ = prompts((60,))
    with ChunkSelection(budget=100).attach(model, Stops()) as attached, torch.no_grad():
        cache = attached.new_cache()
        model(ids, **{cache_argument(model): cache})
        layer, plan = cache.full_layers[0], attached.plan
        plan = replace(plan, shape=replace(plan.shape, scaling=scaling))
        chunks = Chunks(torch.tensor([[0, 4, 20]]), torch.tensor([[4, 16, 10]]))
        got = lossless._attention_to(chunks, layer, plan)
    keys, queries = layer.keys[0, :, :60], layer.last_queries(plan.scorer.queries)[0]
    total = torch.zeros(60)
    for head, of_head in enumerate(queries):
        for query in of_head:
            total += (keys[head * len(keys) // len(queries)] @ query * scaling).softmax(0)
    total /= queries.shape[0] * queries.shape[1]
    wanted = [total[:4].sum(), total[4:20].sum(), total[20:30].sum()]
    torch.testing.assert_close(got[0], torch.stack(wanted).double(), rtol=1e-5, atol=1e-7)
